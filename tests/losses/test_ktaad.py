import math

import pytest
import torch
from torch import nn

from kd_mm.losses.ktaad import CodeLearner, adaptation_distance, cell_affinity_distance, channel_affinity_distance
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

SWEEP = {'KTAADLoss': dict(options=dict(autoencoder='random', code=4), skip=dict(
    test_zero_for_equal_inputs='the student is adapted to a code first',
    test_outside_of_the_region_nothing_counts='the convolutions to the code see over its border'))}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_adaptation_by_hand():
    # Unit vectors (1, 0, 0, 0) and (1/2, 1/2, 1/2, 1/2).
    student = torch.tensor([7.0, 0, 0, 0]).double().view(1, 2, 1, 2)
    teacher = torch.full((1, 2, 1, 2), 3.0).double()
    assert adaptation_distance(student, teacher).item() == pytest.approx(0.5)
    assert adaptation_distance(student, teacher, 2).item() == pytest.approx(1.0)
    both = torch.cat([student, teacher]), torch.cat([teacher, teacher])
    assert adaptation_distance(*both, 2).item() == pytest.approx(0.5) and adaptation_distance(*both).item() == 0.25


def test_cell_affinity_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 4.0]]).double().view(1, 2, 1, 2)  # cosines 1, 0, 0, 1
    teacher = torch.tensor([[1.0, 2.0], [0.0, 2.0]]).double().view(1, 2, 1, 2)  # cosine sqrt(1/2)
    assert cell_affinity_distance(student, teacher).item() == pytest.approx(1 / 2)  # sqrt(2 * 1/2) / 2


def test_cell_affinity_is_that_of_the_matrices():
    student, teacher = torch.randn(3, 4, 3, 5).double().requires_grad_(), torch.randn(3, 6, 3, 5).double()
    rows = [nn.functional.normalize(x.flatten(2), dim=1) for x in (student, teacher)]
    gaps = [torch.einsum('nci,ncj->nij', r, r) for r in rows]
    expected = (gaps[0] - gaps[1]).flatten(1).norm(dim=1).mean() / 15
    found = cell_affinity_distance(student, teacher)
    assert torch.isclose(found, expected, rtol=1e-10)
    assert torch.allclose(*(torch.autograd.grad(x, student)[0] for x in (found, expected)), rtol=1e-7, atol=1e-12)
    equal = student.detach().clone().requires_grad_()
    cell_affinity_distance(equal, equal.detach()).backward()
    assert torch.isfinite(equal.grad).all()


@pytest.mark.parametrize('distance', [cell_affinity_distance, channel_affinity_distance])
def test_region_is_the_affinity_of_its_cells(distance):
    student, teacher = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 4, 3, 5).double()
    mask = torch.zeros(2, 1, 3, 5)
    mask[..., 1:4] = 1
    assert torch.isclose(distance(student, teacher, mask), distance(student[..., 1:4], teacher[..., 1:4]), rtol=1e-10)
    assert distance(student, teacher, 0 * mask).item() == 0.0


def test_channel_affinity_by_hand():
    student, teacher = torch.tensor([1.0, 0.0]).double().view(1, 1, 1, 2), torch.ones(1, 1, 1, 2).double()
    # Outer products (1, 0; 0, 0) and (1, 1; 1, 1) / 2: every entry differs by one half.
    assert channel_affinity_distance(student, teacher).item() == pytest.approx(1 / 2)
    three = (part.repeat(1, 3, 1, 1) for part in (student, teacher))
    assert channel_affinity_distance(*three).item() == pytest.approx(1.5)


def test_terms_are_weighed():
    student, teacher = torch.randn(2, 3, 6, 8).double(), torch.randn(2, 5, 6, 8).double()
    loss = build(dict(type='KTAADLoss', autoencoder='random', code=4, kta_weight=3.0, affinity_weight=7.0, p=2))
    loss.prepare((student, ), (teacher, ))
    code = loss.coder.levels[0].encoder(teacher)
    assert code.shape == (2, 4, 3, 4)
    expected = 3 * adaptation_distance(loss.feature_adapters[0](student), code, 2) + 7 * cell_affinity_distance(
        loss.affinity_adapters[0](student), code)
    assert torch.isclose(loss(student, teacher), expected, rtol=1e-12)
    terms = loss.terms(0, student[..., :4], teacher, KDBatch())  # another size is brought to that of the code
    assert all(torch.isfinite(term) for term in terms.values())


def test_the_learner_rebuilds_the_feature():
    learner, teacher = CodeLearner(3, 2, 0.5), torch.randn(2, 4, 6, 6)
    learner.prepare((teacher, ))
    module = learner.levels[0]
    for part in (module.encoder[2], module.decoder[1]):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    nn.init.constant_(module.encoder[2].bias, -2.0)
    rebuilt, own = learner(0, teacher)
    assert rebuilt.shape == teacher.shape and rebuilt.abs().max() == 0
    assert own.item() == pytest.approx(teacher.square().mean().item() + 0.5 * 2 * 3 * 9, rel=1e-6)
    assert not learner.task_loss


def test_the_encoder_is_frozen_and_what_was_learned_is_used():
    student, teacher = torch.randn(2, 3, 6, 8), torch.randn(2, 5, 6, 8)
    learner = CodeLearner(4, 2, 0.0)
    learner.prepare((teacher, ))
    loss = build(dict(type='KTAADLoss', autoencoder=learner.state_dict(), code=4))
    loss(student, teacher).backward()
    encoder = loss.coder.levels[0].encoder
    assert torch.equal(encoder(teacher), learner.levels[0].encoder(teacher))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in encoder.parameters())
    assert loss.feature_adapters[0].weight.grad.abs().sum() > 0
    assert not any('decoder' in key for key in loss.state_dict())
    with pytest.raises(ValueError, match='learn_tokens.py'):
        build(dict(type='KTAADLoss'))
    with pytest.raises(ValueError, match='does not fit the teacher'):
        build(dict(type='KTAADLoss', autoencoder=learner.state_dict(), code=5))(student, teacher)


@pytest.mark.parametrize('options', [
    dict(code=0), dict(stride=0.5), dict(kta_weight=-1), dict(affinity_weight=math.nan), dict(sparsity=-1), dict(p=3),
    dict(affinity='row')])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='KTAADLoss', autoencoder='random', **options))
