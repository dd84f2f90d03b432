import pytest
import torch
from tensors import Given, draw

from kd_mm.losses.zero_first_order import consistency_map
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def value(student, teacher, batch=None, region=None, **options):
    return build(dict(type='ZeroFirstOrderLoss', **options))(student, teacher, batch, region).item()


def by_loops(logits, mask=None):
    count, _, height, width = logits.shape
    result = logits.new_zeros(count, 1, height, width)
    for image in range(count):
        for y in range(height):
            for x in range(width):
                near = [(y + j, x + i) for j in (-1, 0, 1) for i in (-1, 0, 1) if (j or i)
                        and 0 <= y + j < height and 0 <= x + i < width
                        and (mask is None or mask[image, 0, y + j, x + i] > 0)]
                gaps = [(logits[image, :, y, x] - logits[image, :, j, i]).norm() for j, i in near]
                result[image, 0, y, x] = sum(gaps) / max(len(gaps), 1)
    return result


def test_consistency_equals_the_plain_way():
    logits = draw(2, 3, 3, 4)
    assert torch.allclose(consistency_map(logits), by_loops(logits))
    mask = (draw(2, 1, 3, 4, seed=3) > 0).double()
    assert torch.allclose(consistency_map(logits, mask), by_loops(logits, mask))
    assert torch.allclose(consistency_map(logits[:, :, :1]), by_loops(logits[:, :, :1]))
    assert consistency_map(logits[:, :, :1, :1]).tolist() == [[[[0.0]]], [[[0.0]]]]


def test_closed_form():
    # One step of 3 in the first logit between two pixels; the teacher has a step of 1 in the second.
    student, teacher = torch.zeros(1, 2, 1, 2).double(), torch.zeros(1, 2, 1, 2).double()
    student[0, 0, 0, 1], teacher[0, 1, 0, 1] = 3.0, 1.0
    assert value(student, teacher, zero=0.0, first=2.0) == pytest.approx(2 * 4.0)
    s, t = 1 / (1 + 2.718281828459045**-3), 1 / (1 + 2.718281828459045)
    assert value(student, teacher, zero=5.0, first=0.0) == pytest.approx(5 * 2 * (s - t)**2 / 2)
    both = value(student, teacher, zero=5.0, first=0.0) + value(student, teacher, zero=0.0, first=2.0)
    assert value(student, teacher, zero=5.0, first=2.0) == pytest.approx(both)
    assert value(student, teacher) == pytest.approx(value(student, teacher, zero=1.0, first=0.1))
    assert value(4 * student, 4 * teacher, zero=1.0, first=0.0, tau=4.0) == pytest.approx((s - t)**2)


def test_gradient_equals_the_plain_way():
    student, teacher = draw(1, 3, 3, 4).requires_grad_(), draw(1, 3, 3, 4, seed=1)
    found, = torch.autograd.grad(build(dict(type='ZeroFirstOrderLoss', zero=0.0, first=1.0))(student, teacher), student)
    plain, = torch.autograd.grad((by_loops(student) - by_loops(teacher)).square().mean(), student)
    assert torch.allclose(found, plain, rtol=1e-10, atol=1e-14)


def test_memory_holds_no_differences():
    student, kept = draw(1, 8, 6, 6).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        consistency_map(student)
    large = {tensor.data_ptr() for tensor in kept if tensor.shape[1] == 8}
    assert large == {student.data_ptr()}


def test_even_logits_have_a_finite_gradient():
    student = torch.zeros(1, 3, 3, 3).requires_grad_()
    build(dict(type='ZeroFirstOrderLoss'))(student, draw(1, 3, 3, 3).float()).backward()
    assert torch.isfinite(student.grad).all()


def test_ignored_pixels_and_region():
    student, teacher = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    expected = value(student[..., 2:], teacher[..., 2:])
    seg_map = torch.zeros(2, 4, 6, dtype=torch.uint8)
    seg_map[:, :, :2] = 255
    assert value(student, teacher, KDBatch(seg_map=seg_map)) == pytest.approx(expected, rel=1e-10)
    unmasked = value(student, teacher, KDBatch(seg_map=seg_map), mask_ignored=False)
    assert unmasked == pytest.approx(value(student, teacher), rel=1e-12)
    mask = (seg_map != 255).double()[:, None]
    assert value(student, teacher, KDBatch(), Given(3 * mask)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize('options', [dict(zero=-1), dict(first=float('nan')), dict(tau=0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='ZeroFirstOrderLoss', **options))
    with pytest.raises(ValueError, match='needs maps'):
        value(draw(4, 3), draw(4, 3))
