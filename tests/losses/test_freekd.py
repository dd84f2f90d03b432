import math

import pytest
import torch

from kd_mm.losses.freekd import FreeKDLoss, dice_overlap, haar_bands, haar_step, prompt_masks
from kd_mm.registry import build


def test_one_step_by_hand():
    low, high = haar_step(torch.tensor([[1.0, 2.0], [3.0, 10.0]]).view(1, 1, 2, 2))
    assert low.item() == 8.0
    assert high.flatten().tolist() == [(1 + 2 - 3 - 10) / 2, (1 - 2 + 3 - 10) / 2, (1 - 2 - 3 + 10) / 2]


def test_the_transform_keeps_the_energy_and_pads_with_zeros():
    features = torch.randn(2, 3, 5, 6).double()
    low, high = haar_step(features)
    assert low.shape == (2, 3, 3, 3) and high.shape == (2, 3, 3, 3, 3)
    assert torch.isclose(low.square().sum() + high.square().sum(), features.square().sum())


def test_closed_form():
    # One channel, a gap of 1 in one cell of 2 x 2: every band has |1/2|.
    student, teacher = torch.zeros(1, 1, 2, 2).double(), torch.zeros(1, 1, 2, 2).double()
    student[..., 0, 0] = 1
    assert build(dict(type='FreeKDLoss', depth=1))(student, teacher).item() == pytest.approx(0.5)
    # The low band is 1/2; its next step, filled up with zeros, has 1/4 in every band.
    assert build(dict(type='FreeKDLoss', depth=2))(student, teacher).item() == pytest.approx(0.75)


def test_tokens_by_hand():
    teacher = torch.zeros(1, 1, 2, 2).double()
    teacher[..., 0, 0] = 2  # each band 1, their sum 3
    student = torch.zeros_like(teacher)
    tokens = torch.zeros(2, 2, 1).double()
    tokens[0], tokens[1, 0] = 99.0, math.log(3) / 3  # masks 3/4 and 1/2; row 0 is not used
    found = build(dict(type='FreeKDLoss', depth=1, tokens=[tokens]))(student, teacher)
    assert found.item() == pytest.approx((0.75 + 0.5) / 2)


def test_a_constant_has_no_frequency():
    features = torch.randn(1, 3, 8, 8).double()
    assert build(dict(type='FreeKDLoss'))(features + 5, features).item() < 1e-12


def test_a_region_weighs_the_difference():
    student, teacher = torch.randn(1, 3, 8, 8).double(), torch.randn(1, 3, 8, 8).double()
    loss, mask = build(dict(type='FreeKDLoss')), torch.zeros(1, 1, 8, 8).double()
    mask[..., :4] = 1
    inside = teacher + mask * (student - teacher)
    assert torch.isclose(loss.level_loss(0, student, teacher, None, mask), loss(inside, teacher), rtol=1e-12)


def test_tokens_from_a_file(tmp_path):
    tokens = [torch.randn(4, 2, 3), torch.randn(4, 2, 3)]
    torch.save(dict(tokens=tokens), tmp_path / 'tokens.pth')
    loss = build(dict(type='FreeKDLoss', tokens=str(tmp_path / 'tokens.pth')))
    other = build(dict(type='FreeKDLoss', tokens=tokens))
    maps = (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4))
    teacher = tuple(torch.randn_like(tensor) for tensor in maps)
    assert torch.equal(loss(maps, teacher), other(maps, teacher))
    assert set(loss.state_dict()) == {'tokens_0', 'tokens_1'} and not list(loss.parameters())
    assert loss(tuple(m.double() for m in maps), tuple(t.double() for t in teacher)).dtype == torch.float64


def test_wrong_tokens():
    with pytest.raises(ValueError, match=r'level 0: \(3, 2, 3\) is not .* depth=3'):
        build(dict(type='FreeKDLoss', tokens=[torch.zeros(3, 2, 3)]))
    loss = build(dict(type='FreeKDLoss', tokens=[torch.zeros(4, 2, 3)]))
    with pytest.raises(ValueError, match='tokens of 3 channels for a teacher of 5'):
        loss(torch.zeros(1, 5, 8, 8), torch.zeros(1, 5, 8, 8))
    with pytest.raises(ValueError, match='tokens for 1 levels, but there are 2'):
        loss((torch.zeros(1, 3, 8, 8), ) * 2, (torch.zeros(1, 3, 8, 8), ) * 2)
    with pytest.raises(ValueError, match='depth'):
        build(dict(type='FreeKDLoss', depth=0))


def test_dice_by_hand():
    masks = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 1.0]]])[None]
    assert dice_overlap(masks).item() == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert dice_overlap(masks[:, :1]).item() == 0.0


def test_learning_tokens_makes_their_masks_differ():
    teacher = (torch.randn(1, 6, 16, 16, generator=torch.Generator().manual_seed(0)), )
    torch.manual_seed(0)
    tokens = FreeKDLoss.new_tokens(teacher, count=3, std=0.1)
    before = FreeKDLoss.token_loss(tokens, teacher)
    for _ in range(20):
        grad, = torch.autograd.grad(FreeKDLoss.token_loss(tokens, teacher), list(tokens))
        with torch.no_grad():
            tokens[0] -= 5.0 * grad
    assert FreeKDLoss.token_loss(tokens, teacher) < before - 0.05
    assert prompt_masks(haar_bands(teacher[0], 1)[0], tokens[0][1]).shape == (1, 3, 8, 8)
    build(dict(type='FreeKDLoss', tokens=list(tokens)))(teacher, teacher)
