import math

import pytest
import torch
from tensors import Given, draw

from kd_mm.losses.dkd import decoupled_terms
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def value(student, teacher, batch=None, region=None, **options):
    return build(dict(type='DKDLoss', **options))(student, teacher, batch, region).item()


def example(tau=1.0):
    """Teacher (1/2, 3/8, 1/8), student (1/4, 3/8, 3/8); the target is the first class."""
    teacher, student = torch.tensor([[4.0, 3.0, 1.0]]).double(), torch.tensor([[2.0, 3.0, 3.0]]).double()
    return tau * student.log(), tau * teacher.log()


TCKD = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
NCKD = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)


def test_closed_form():
    tckd, nckd = decoupled_terms(*example(), torch.tensor([0]))
    assert tckd.item() == pytest.approx(TCKD) and nckd.item() == pytest.approx(NCKD)
    batch = KDBatch(row_labels=torch.tensor([0]))
    assert value(*example(), batch) == pytest.approx(TCKD + 0.25 * NCKD)
    assert value(*example(), batch, alpha=2.0, beta=8.0) == pytest.approx(2 * TCKD + 8 * NCKD)
    assert value(*example(4.0), batch, tau=4.0) == pytest.approx(16 * (TCKD + 0.25 * NCKD))


def test_the_parts_make_the_whole_divergence():
    student, teacher, target = draw(7, 5), draw(7, 5, seed=1), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    tckd, nckd = decoupled_terms(student, teacher, target)
    rest = 1 - teacher.softmax(dim=1).gather(1, target[:, None])[:, 0]
    whole = build(dict(type='SoftmaxKDLoss'))(student, teacher)
    assert torch.isclose((tckd + rest * nckd).mean(), whole, rtol=1e-12)


def test_a_sure_teacher_does_not_overflow():
    teacher = torch.tensor([[200.0, 1.0, 0.0]])
    student = torch.tensor([[-200.0, 0.0, 1.0]]).requires_grad_()
    total = build(dict(type='DKDLoss'))(student, teacher, KDBatch(row_labels=torch.tensor([0])))
    total.backward()
    assert total.item() == pytest.approx(201.3 + 0.25 * 0.4621, abs=0.1) and torch.isfinite(student.grad).all()


def test_labels_of_pixels():
    student, teacher = draw(1, 3, 2, 2), draw(1, 3, 2, 2, seed=1)
    seg_map = torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8).repeat_interleave(2, 1).repeat_interleave(2, 2)
    rows = [z.permute(0, 2, 3, 1).reshape(-1, 3)[:3] for z in (student, teacher)]
    expected = value(*rows, KDBatch(row_labels=torch.tensor([0, 1, 2])))
    tckd, nckd = decoupled_terms(*rows, torch.tensor([0, 1, 2]))
    assert expected == pytest.approx((tckd + 0.25 * nckd).mean().item(), rel=1e-12)
    assert value(student, teacher, KDBatch(seg_map=seg_map)) == pytest.approx(expected, rel=1e-12)
    seg_map[seg_map == 2] = 77  # no class of these logits
    expected = value(rows[0][:2], rows[1][:2], KDBatch(row_labels=torch.tensor([0, 1])))
    assert value(student, teacher, KDBatch(seg_map=seg_map)) == pytest.approx(expected, rel=1e-12)
    expected = value(rows[0][1:2], rows[1][1:2], KDBatch(row_labels=torch.tensor([1])))
    assert value(student, teacher, KDBatch(seg_map=seg_map, ignore_index=0)) == pytest.approx(expected, rel=1e-12)
    seg_map[:] = 255
    assert value(student, teacher, KDBatch(seg_map=seg_map)) == 0.0


def test_the_teachers_best_class():
    student, teacher = draw(6, 4), draw(6, 4, seed=1)
    expected = value(student, teacher, KDBatch(row_labels=teacher.argmax(dim=1)))
    assert value(student, teacher, target='teacher_argmax') == pytest.approx(expected, rel=1e-12)
    maps = [z[:, :, None, None] for z in (student, teacher)]
    assert value(*maps, target='teacher_argmax') == pytest.approx(expected, rel=1e-12)
    ignored = KDBatch(seg_map=torch.tensor([255, 0, 0, 255, 0, 0]).view(6, 1, 1))
    keep = [1, 2, 4, 5]
    some = value(student[keep], teacher[keep], target='teacher_argmax')
    assert value(*maps, ignored, target='teacher_argmax') == pytest.approx(some, rel=1e-12)
    everywhere = value(*maps, ignored, target='teacher_argmax', mask_ignored=False)
    assert everywhere == pytest.approx(expected, rel=1e-12)


def test_region_weighs_the_pixels():
    student, teacher = draw(1, 3, 1, 2), draw(1, 3, 1, 2, seed=1)
    batch = KDBatch(seg_map=torch.tensor([[[0, 1]]]))
    single = [value(student[..., i:i + 1], teacher[..., i:i + 1], KDBatch(seg_map=batch.targets.seg_map[..., i:i + 1]))
              for i in (0, 1)]
    mask = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    assert value(student, teacher, batch, Given(mask)) == pytest.approx((single[0] + 3 * single[1]) / 4, rel=1e-12)


def test_labels_are_needed():
    with pytest.raises(ValueError, match='row_labels'):
        value(draw(4, 3), draw(4, 3), KDBatch(labels=[torch.zeros(4)]))
    with pytest.raises(ValueError, match='segmentation map'):
        value(draw(1, 3, 2, 2), draw(1, 3, 2, 2))
    with pytest.raises(ValueError, match='1 channel.*SigmoidKDLoss'):
        value(draw(4, 1), draw(4, 1), target='teacher_argmax')
    empty = draw(0, 3).requires_grad_()
    assert value(empty, draw(0, 3), target='teacher_argmax') == 0.0


@pytest.mark.parametrize('options', [dict(alpha=-1), dict(beta=float('nan')), dict(tau=0), dict(target='student')])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='DKDLoss', **options))
