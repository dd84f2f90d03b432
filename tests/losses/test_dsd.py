import math

import pytest
import torch
from tensors import Given, draw

from kd_mm.losses.dsd import attention_residuals, category_similarity
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def value(student, teacher, batch=None, region=None, **options):
    return build(dict(type='DSDLoss', **options))(student, teacher, batch, region).item()


def levels(seed, size=(4, 6), widths=(3, 4, 5)):
    return tuple(draw(2, width, *size, seed=seed + index) for index, width in enumerate(widths))


def one_cell(*where):
    """A map of two cells for each entry, all in that cell."""
    return tuple(torch.eye(2).double()[index].view(1, 1, 1, 2) for index in where)


def test_closed_form_of_the_residuals():
    # Attentions e0 and e1: the residual is (-1, 1) / sqrt(2); swapped in the teacher.
    student, teacher = one_cell(0, 1), one_cell(1, 0)
    residual, = attention_residuals(student)
    assert residual[0].tolist() == pytest.approx([-0.5**0.5, 0.5**0.5])
    # Both cells differ by sqrt(2).
    assert value(student, teacher, psd=3.0, csd=0.0) == pytest.approx(3 * 2.0)
    # Three maps have three pairs, of which the last two do not differ: e0 to e0 is no direction, e1 to e0 is the same.
    student, teacher = one_cell(0, 1, 0), one_cell(1, 0, 0)
    pairs = attention_residuals(student)
    assert [pair[0].abs().sum().item() for pair in pairs] == pytest.approx([2**0.5, 0.0, 2**0.5])
    # (1) 2; (2) (0, 0) and (1, -1) / sqrt(2): mean 1/2; (3) (1, -1) / sqrt(2) and (0, 0): 1/2
    assert value(student, teacher, psd=1.0, csd=0.0) == pytest.approx((2.0 + 0.5 + 0.5) / 3)


def test_closed_form_of_the_classes():
    # Windows of 2x2: two cells. Class 0 is 3 to 1 there at tau 4, class 1 even.
    logits = torch.zeros(1, 2, 2, 4).double()
    logits[:, 0, :, :2] = 4 * math.log(3)
    found, filled = category_similarity(logits, 4.0)
    assert filled is None
    assert found[0].flatten().tolist() == pytest.approx([0.625, 0.5, 0.5, 0.5])
    empty, filled = category_similarity(logits, 4.0, mask=torch.zeros(1, 1, 2, 4))
    assert filled.tolist() == [[False]] and empty.abs().sum() == 0
    other = torch.zeros_like(logits)
    flat = torch.ones(1, 3, 2, 4).double()
    assert value((flat, logits), (flat, other), psd=0.0, csd=8.0) == pytest.approx(8 * 0.125**2 / 4)
    assert value((flat, logits), (flat, other), psd=0.0, csd=8.0, tau=1.0) > 8 * 0.2**2 / 4


def test_the_total_weighs_the_terms_and_images_count_once():
    student, teacher = levels(0), levels(10)
    teacher = (*teacher[:2], teacher[2])
    loss = build(dict(type='DSDLoss', psd=2.0, csd=30.0))
    terms = loss.terms(student, teacher, KDBatch(), [None] * 3)
    total = loss(student, teacher).item()
    assert total == pytest.approx((2 * terms['psd'] + 30 * terms['csd']).item(), rel=1e-12)
    twice = [tuple(torch.cat([tensor] * 2) for tensor in side) for side in (student, teacher)]
    assert loss(*twice).item() == pytest.approx(total, rel=1e-12)


def test_maps_of_other_sizes():
    student, teacher = levels(0), levels(10)

    def fine(side):
        return (side[0].repeat_interleave(2, 2).repeat_interleave(2, 3), *side[1:])

    assert value(fine(student), fine(teacher)) == pytest.approx(value(student, teacher), rel=1e-10)


def test_ignored_pixels_are_left_out_of_the_classes():
    student, teacher = levels(0), levels(10)
    seg_map = torch.zeros(2, 8, 12, dtype=torch.uint8)
    seg_map[:, :, 8:] = 255
    batch = KDBatch(seg_map=seg_map)
    part = [(side[0], side[2][..., :4]) for side in (student, teacher)]
    cut = [(pair[0][..., :4], pair[1]) for pair in part]
    expected = value(*cut, psd=0.0)
    assert value(student, teacher, batch, psd=0.0) == pytest.approx(expected, rel=1e-10)
    unmasked = value(student, teacher, batch, psd=0.0, mask_ignored=False)
    assert unmasked == pytest.approx(value(student, teacher, psd=0.0), rel=1e-12)
    assert value(student, teacher, batch, csd=0.0) == pytest.approx(value(student, teacher, csd=0.0), rel=1e-12)


@pytest.mark.parametrize('options', [dict(psd=0.0), dict(csd=0.0)])
def test_region_is_the_loss_of_its_cells(options):
    student, teacher = levels(0), levels(10)
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, :, 2:] = 2.0
    part = [tuple(tensor[..., 2:] for tensor in side) for side in (student, teacher)]
    expected = value(*part, **options)
    assert value(student, teacher, KDBatch(), Given(mask), **options) == pytest.approx(expected, rel=1e-10)
    mask[1] = 0
    expected = value(*(tuple(tensor[:1] for tensor in side) for side in part), **options)
    assert value(student, teacher, KDBatch(), Given(mask), **options) == pytest.approx(expected, rel=1e-10)


def test_errors():
    with pytest.raises(ValueError, match='one level'):
        value(levels(0)[:1], levels(0)[:1])
    with pytest.raises(ValueError, match='last level must be logits'):
        value(levels(0), levels(0, widths=(3, 4, 6)))


@pytest.mark.parametrize('options', [dict(psd=-1), dict(csd=float('nan')), dict(tau=0), dict(p=0.5)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='DSDLoss', **options))
