import math

import pytest
import torch

from kd_mm.losses.maskd import TokenLearner, masked_distance
from kd_mm.ops.functional import dice_similarity
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

SWEEP = {'MasKDLoss': dict(options=dict(tokens='random', num_tokens=3))}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tokens(*rows):
    return {'levels.0.tokens': torch.tensor(rows, dtype=torch.float64)}


def test_closed_form():
    # One token, mask 3/4 at the first of two cells and 1/2 at the second; squares are 1 and 4 in both channels.
    teacher = torch.tensor([[math.log(3), 0.0], [5.0, 5.0]], dtype=torch.float64).view(1, 2, 1, 2)
    student = teacher + torch.tensor([1.0, 2.0]).double()
    options = dict(type='MasKDLoss', tokens=tokens([1.0, 0.0]), num_tokens=1, token_weights='mean', loss_weight=2.0)
    expected = (0.75**2 * 1 + 0.5**2 * 4) / 1.25
    assert build(options)(student, teacher).item() == pytest.approx(2 * expected, rel=1e-12)
    # The student's masks: sigmoid(log 3 + 1) and sigmoid(2).
    late = [0.75 / (1 + math.exp(-math.log(3) - 1)), 0.5 / (1 + math.exp(-2))]
    expected = (late[0]**2 + 4 * late[1]**2) / sum(late)
    found = build(dict(options, student_mask_after=5))(student, teacher, KDBatch(step=5))
    assert found.item() == pytest.approx(2 * expected, rel=1e-12)
    assert build(dict(options, student_mask_after=6))(student, teacher, KDBatch(step=5)).item() != found.item()


def test_eps_is_added_to_the_sum_of_a_mask():
    gap = torch.ones(1, 2, 1, 2).double()
    masks = torch.full((1, 1, 1, 2), 0.5).double()
    assert masked_distance(gap, 0 * gap, masks, eps=1.0).item() == pytest.approx(0.5 / 2)


def test_tokens_are_weighed_for_each_image():
    teacher, student = torch.randn(2, 4, 5, 5).double(), torch.randn(2, 4, 5, 5).double()
    loss = build(dict(type='MasKDLoss', tokens='random', num_tokens=2, loss_weight=1.0))
    loss.prepare((student, ), (teacher, ))
    module = loss.finder.levels[0]
    torch.nn.init.normal_(module.tokens)
    module.prob[2].weight.data.zero_()
    module.prob[2].bias.data = torch.tensor([math.log(3), 0.0]).double()
    each = masked_distance(student, teacher, module.masks(teacher))
    assert torch.allclose(module.weights(teacher), torch.tensor([0.75, 0.25]).double(), rtol=1e-6)
    assert torch.isclose(loss(student, teacher), (0.75 * each[:, 0] + 0.25 * each[:, 1]).mean(), rtol=1e-6)


def test_dice():
    assert dice_similarity(torch.ones(2, 3, 4, 4)).item() == pytest.approx(1.0)
    assert dice_similarity(torch.eye(3).view(1, 3, 1, 3)).item() == 0.0
    half = torch.tensor([[1.0, 1.0], [1.0, 0.0]]).view(1, 2, 1, 2)
    assert dice_similarity(half).item() == pytest.approx(2 / 3)
    assert dice_similarity(torch.ones(1, 1, 2, 2)).item() == 0.0


@pytest.mark.parametrize('weighted', [True, False])
def test_the_learner_shows_the_teacher_its_masked_features(weighted):
    learner, teacher = TokenLearner(2, weighted), torch.randn(2, 4, 5, 5)
    learner.prepare((teacher, ))
    module = learner.levels[0]
    module.tokens.data = torch.tensor([[1e6] * 4, [-1e6] * 4])  # one mask is the complement of the other
    shown, own = learner(0, teacher)
    if not weighted:
        assert torch.allclose(shown, teacher) and own.item() == pytest.approx(0.0, abs=1e-4)
    else:
        first = torch.where(teacher.sum(dim=1, keepdim=True) > 0, *(
            module.weights(teacher)[:, index, None, None, None] for index in (0, 1)))
        assert torch.allclose(shown, teacher * first, rtol=1e-4)


def test_tokens_are_frozen_and_saved():
    student, teacher = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(2, 4, 5, 5)
    loss = build(dict(type='MasKDLoss', tokens='random'))
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert list(loss.parameters()) and all(p.grad is None and not p.requires_grad for p in loss.parameters())
    assert 'finder.levels.0.tokens' in loss.state_dict()


def test_what_is_given_must_exist_and_fit(tmp_path):
    with pytest.raises(ValueError, match='tokens=None.*learn_tokens.py'):
        build(dict(type='MasKDLoss'))
    with pytest.raises(ValueError, match='does not exist.*learn_tokens.py'):
        build(dict(type='MasKDLoss', tokens=str(tmp_path / 'none.pth')))
    torch.save(dict(loss='FreeKDLoss', state_dict={}), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='was not written for it .*FreeKDLoss'):
        build(dict(type='MasKDLoss', tokens=str(tmp_path / 'other.pth')))
    x = torch.randn(1, 3, 4, 4)
    wrong = build(dict(type='MasKDLoss', tokens=tokens([1.0, 0.0]), num_tokens=1, token_weights='mean'))
    with pytest.raises(ValueError, match=r'does not fit the teacher.*given \(1, 2\), needed \(1, 3\)'):
        wrong(x, x)
    with pytest.raises(ValueError, match='prob.*given missing'):
        build(dict(type='MasKDLoss', tokens=tokens([1.0, 0.0, 0.0]), num_tokens=1))(x, x)


@pytest.mark.parametrize('options', [
    dict(num_tokens=0), dict(num_tokens=1.5), dict(token_weights='sum'), dict(student_mask_after=-1), dict(eps=-1)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='MasKDLoss', tokens='random', **options))
