import pytest
import torch
from torch import nn

from kd_mm.ops.sampling import keep_mask
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

SWEEP = {'MGDLoss': dict(skip=dict(
    test_outside_of_the_region_nothing_counts="the generator's convolutions reach over the border"))}


def identity(loss):
    for index in range(len(loss.generators)):
        loss.generators[index] = nn.Identity()
    return loss


def prepared(*features, **options):
    loss = build(dict(type='MGDLoss', **options))
    loss.prepare(features, features)
    return loss


def test_closed_form():
    # Nothing is masked and the generator adds nothing: sum of squares over N.
    student, teacher = torch.full((2, 3, 4, 5), 3.0).double(), torch.ones(2, 3, 4, 5).double()
    loss = identity(prepared(student, mask_ratio=0.0, loss_weight=0.5))
    assert loss(student, teacher).item() == pytest.approx(0.5 * 4 * 60, rel=1e-12)


def test_everything_masked_leaves_the_bias():
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.ones(2, 3, 4, 5).double()
    loss = identity(prepared(student, mask_ratio=1.0, loss_weight=1.0))
    loss.fixed_masks = [torch.zeros(2, 1, 4, 5)]
    assert loss(student, teacher).item() == pytest.approx(60, rel=1e-12)


def test_no_mask_and_identity_generator_is_fitnet():
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    loss = identity(prepared(student, mask_ratio=0.0, loss_weight=1.0))
    hint = build(dict(type='FitNetLoss', reduction='batch_mean', loss_weight=1.0))
    assert torch.isclose(loss(student, teacher), hint(student, teacher), rtol=1e-12)


@pytest.mark.parametrize('mask_on, shape', [('pixel', (4, 1, 40, 50)), ('channel', (4, 64, 1, 1))])
def test_the_ratio_is_masked_out(mask_on, shape):
    loss = build(dict(type='MGDLoss', mask_ratio=0.75, mask_on=mask_on))
    mask = loss.draw_mask(0, torch.zeros(4, 64, 40, 50), KDBatch())
    assert mask.shape == shape and set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.25, abs=0.1 if mask_on == 'channel' else 0.02)
    assert keep_mask(torch.tensor([0.24, 0.25, 0.26]), 0.75).tolist() == [1.0, 1.0, 0.0]


def test_masks_depend_on_seed_rank_step_and_level_alone(monkeypatch):
    loss, like = build(dict(type='MGDLoss')), torch.zeros(2, 3, 8, 8)

    def draw(level=0, **fields):
        return loss.draw_mask(level, like, KDBatch(**fields))

    first = draw(seed=5, step=7)
    torch.manual_seed(99)
    assert torch.equal(draw(seed=5, step=7), first)
    others = [draw(seed=6, step=7), draw(seed=5, step=8), draw(level=1, seed=5, step=7), draw(seed=7, step=5)]
    monkeypatch.setattr('torch.distributed.is_initialized', lambda: True)
    monkeypatch.setattr('torch.distributed.get_rank', lambda: 1)
    others.append(draw(seed=5, step=7))
    assert not any(torch.equal(first, other) for other in others)


def test_the_global_random_numbers_are_untouched():
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    loss = prepared(student)
    before = torch.get_rng_state()
    loss(student, teacher, KDBatch(step=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_masked_cells_are_not_seen():
    student, teacher = torch.randn(1, 3, 6, 6), torch.randn(1, 3, 6, 6)
    loss = prepared(student)
    mask = torch.ones(1, 1, 6, 6)
    mask[..., 2:4, 2:4] = 0
    loss.fixed_masks = [mask]
    moved = student + 10 * (1 - mask)
    assert torch.equal(loss(student, teacher), loss(moved, teacher))


def test_one_generator_a_level():
    levels = torch.randn(1, 3, 4, 4), torch.randn(1, 5, 2, 2)
    loss = prepared(*levels)
    assert [g[0].in_channels for g in loss.generators] == [3, 5]
    assert len({id(p) for p in loss.parameters()}) == 8


@pytest.mark.parametrize('options', [dict(mask_ratio=1.5), dict(mask_ratio=-0.1), dict(mask_on='row')])
def test_bad_options(options):
    with pytest.raises(ValueError, match='mask_'):
        build(dict(type='MGDLoss', **options))
