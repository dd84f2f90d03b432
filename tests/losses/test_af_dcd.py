import math

import pytest
import torch
from torch import nn

from kd_mm.losses.af_dcd import TwoBranch, omni_contrast
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

SMALL = dict(groups=3, pool=2, patch=(2, 2))
SWEEP = {'AfDCDLoss': dict(options=SMALL, skip=dict(
    test_zero_for_equal_inputs='a contrast is a cross-entropy, and cells are masked out before the projector',
    test_outside_of_the_region_nothing_counts='the projector looks at the whole map on purpose'))}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def contrast(student, teacher, **options):
    return omni_contrast(student, teacher, **dict(dict(tau=1.0, groups=2, pool=1, patch=(1, 2)), **options)).item()


def test_contrast_by_hand():
    # One patch of two cells, two groups of one channel: (cell, group) vectors are numbers.
    student = torch.tensor([[0.0, 1.0], [5.0, 7.0]]).double().view(1, 2, 1, 2)
    teacher = torch.tensor([[0.5, 1.0], [4.0, 9.0]]).double().view(1, 2, 1, 2)

    def term(own, *others):
        return own + math.log(math.exp(-own) + sum(math.exp(-other) for other in others))

    # Group 0 against group 1 of both cells, and the other way round; the own group's other cell is left out.
    expected = term(0.5, 4, 9) + term(0, 3, 8) + term(1, 4.5, 4) + term(2, 6.5, 6)
    assert contrast(student, teacher) == pytest.approx(expected / 2, rel=1e-12)
    twice = contrast(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1))
    assert twice == pytest.approx(expected / 2, rel=1e-12)
    assert contrast(student, teacher, tau=2.0) == pytest.approx(contrast(student / 2, teacher / 2), rel=1e-12)


def test_patches_do_not_see_each_other():
    student, teacher = torch.randn(1, 4, 4, 4).double(), torch.randn(1, 4, 4, 4).double()
    parts = sum(contrast(student[:, :, :, x:x + 2], teacher[:, :, :, x:x + 2], patch=(4, 2)) for x in (0, 2)) / 2
    assert contrast(student, teacher, patch=(4, 2)) == pytest.approx(parts, rel=1e-12)
    assert contrast(student, teacher, patch=(4, 4)) > parts  # more negatives


def test_channels_of_a_group_belong_together():
    student = torch.randn(1, 4, 2, 2).double()
    teacher = student.clone()
    teacher[:, 2:] += 100  # the groups are far apart
    assert contrast(student, student + 100 * torch.tensor([0, 0, 1, 1])[:, None, None]) > 10
    student = teacher.clone()
    assert contrast(student, teacher) == pytest.approx(0.0, abs=1e-9)


def test_a_partial_patch_is_the_patch_of_what_is_there():
    student, teacher = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 4, 3, 5).double()
    parts = []
    for y in (slice(0, 2), slice(2, 3)):
        for x in (slice(0, 4), slice(4, 5)):
            s, t = student[:, :, y, x], teacher[:, :, y, x]
            parts.append(contrast(s, t, patch=tuple(s.shape[2:])) * s[0, 0].numel())
    assert contrast(student, teacher, patch=(2, 4)) == pytest.approx(sum(parts) / 15, rel=1e-12)


def test_maps_are_max_pooled():
    student, teacher = torch.randn(2, 4, 4, 8).double(), torch.randn(2, 4, 4, 8).double()
    pooled = [nn.functional.max_pool2d(x, 2) for x in (student, teacher)]
    assert contrast(student, teacher, pool=2, patch=(2, 2)) == pytest.approx(
        contrast(*pooled, patch=(2, 2)), rel=1e-12)


def test_region_chooses_the_cells():
    student, teacher = torch.randn(1, 4, 2, 4).double(), torch.randn(1, 4, 2, 4).double()
    mask = torch.zeros(1, 1, 2, 4)
    mask[..., 1:3] = 1
    inside = contrast(student[..., 1:3], teacher[..., 1:3], patch=(2, 2))
    assert contrast(student, teacher, patch=(2, 4), mask=mask) == pytest.approx(inside, rel=1e-12)


def test_terms_are_weighed():
    student, teacher = torch.randn(2, 6, 8, 10).double(), torch.randn(2, 6, 8, 10).double()
    loss = build(dict(type='AfDCDLoss', fd_weight=2.0, contrast_weight=3.0, **SMALL))
    loss.prepare((student, ), (teacher, ))
    loss.projectors[0] = nn.Identity()
    loss.fixed_masks = [torch.ones(2, 1, 8, 10)]
    assert torch.isclose(
        loss(student, teacher), 2 * (student - teacher).square().sum() / 2 + 3 * omni_contrast(
            student, teacher, groups=3, pool=2, patch=(2, 2)), rtol=1e-12)
    assert loss.terms(0, teacher, teacher, KDBatch())['fd'].item() == 0.0


def test_masks_depend_on_seed_step_and_level_alone():
    loss, like = build(dict(type='AfDCDLoss', **SMALL)), torch.zeros(2, 6, 40, 40)
    first = loss.draw_mask(0, like, KDBatch(seed=1, step=2))
    torch.manual_seed(9)
    assert torch.equal(loss.draw_mask(0, like, KDBatch(seed=1, step=2)), first)
    assert first.shape == (2, 1, 40, 40) and first.mean().item() == pytest.approx(0.25, abs=0.03)
    for other in (loss.draw_mask(1, like, KDBatch(seed=1, step=2)), loss.draw_mask(0, like, KDBatch(seed=1, step=3)),
                  loss.draw_mask(0, like, KDBatch(seed=2, step=2))):
        assert not torch.equal(other, first)


def test_two_branches():
    block, x = TwoBranch(2), torch.randn(1, 2, 4, 4)
    near = block.block_1(x)
    assert torch.allclose(block(x), 0.5 * block.end_1(near) + 0.5 * block.end_2(block.block_2(near)), atol=1e-6)
    loss = build(dict(type='AfDCDLoss', enhanced=True, groups=2))
    loss.prepare((x, ), (x, ))
    assert isinstance(loss.projectors[0], TwoBranch)


@pytest.mark.parametrize('options', [
    dict(mask_ratio=1.1), dict(tau=0), dict(groups=1), dict(pool=0), dict(patch=(4, 0)), dict(fd_weight=-1),
    dict(contrast_weight=-1)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='AfDCDLoss', **options))


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match='level 0: groups=4 does not divide 6 channels'):
        build(dict(type='AfDCDLoss', groups=4))(torch.ones(1, 6, 8, 8), torch.ones(1, 6, 8, 8))
