import math

import pytest
import torch

from kd_mm.losses.freekd import PromptLearner, haar_join, haar_step
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


def test_the_inverse_gives_the_map_back():
    features = torch.randn(2, 3, 5, 7).double()
    assert torch.allclose(haar_join(*haar_step(features), (5, 7)), features, rtol=1e-12, atol=1e-12)


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
    state = {f'tokens.{level}': value for level, value in enumerate(tokens)}
    torch.save(dict(loss='FreeKDLoss', state_dict=state, about={}), tmp_path / 'tokens.pth')
    loss = build(dict(type='FreeKDLoss', tokens=str(tmp_path / 'tokens.pth'), num_tokens=2))
    other = build(dict(type='FreeKDLoss', tokens=tokens))
    maps = (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4))
    teacher = tuple(torch.randn_like(tensor) for tensor in maps)
    assert torch.equal(loss(maps, teacher), other(maps, teacher))
    assert set(loss.state_dict()) == {'prompts.tokens.0', 'prompts.tokens.1'}
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_wrong_tokens():
    with pytest.raises(ValueError, match=r'level 0: \(3, 2, 3\) is not .* depth=3'):
        build(dict(type='FreeKDLoss', tokens=[torch.zeros(3, 2, 3)]))
    loss = build(dict(type='FreeKDLoss', tokens=[torch.zeros(4, 2, 3)]))
    with pytest.raises(ValueError, match=r'given \(4, 2, 3\), needed \(4, 2, 5\)\). It was learned from another'):
        loss(torch.zeros(1, 5, 8, 8), torch.zeros(1, 5, 8, 8))
    loss = build(dict(type='FreeKDLoss', tokens=[torch.zeros(4, 2, 3)]))
    with pytest.raises(ValueError, match=r'1 of 2 entries; tokens.1: given missing'):
        loss((torch.zeros(1, 3, 8, 8), ) * 2, (torch.zeros(1, 3, 8, 8), ) * 2)
    with pytest.raises(ValueError, match='does not exist'):
        build(dict(type='FreeKDLoss', tokens='no.pth'))
    with pytest.raises(ValueError, match='depth'):
        build(dict(type='FreeKDLoss', depth=0))


def test_the_prompted_teacher_by_hand():
    """Masks of one half: the high bands are halved, the low band goes on as it is."""
    learner = PromptLearner(2, 3)
    teacher = torch.randn(2, 4, 6, 8).double()
    learner.prepare((teacher, ))
    with torch.no_grad():
        learner.tokens[0].zero_()
    shown, overlap = learner(0, teacher)
    half = teacher.clone()
    low, high = haar_step(half)
    low = haar_join(haar_step(low)[0], haar_step(low)[1] / 2, low.shape[2:])
    assert shown.shape == teacher.shape  # 6 rows: the second step works on 3
    assert torch.allclose(shown, haar_join(low, high / 2, (6, 8)), rtol=1e-12)
    assert overlap.item() == pytest.approx(1.0)


def test_learning_makes_the_masks_differ():
    torch.manual_seed(0)
    teacher = torch.randn(1, 6, 16, 16)
    learner = PromptLearner(3, 3)
    learner.prepare((teacher, ))
    before = learner(0, teacher)[1]
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        learner(0, teacher)[1].backward()
        optimizer.step()
    after = learner(0, teacher)[1]
    assert after < before - 0.05
    assert learner.tokens[0].grad[0].abs().sum() == 0  # the row of the low band
    build(dict(type='FreeKDLoss', tokens=learner.state_dict(), num_tokens=3))(teacher, teacher)
