import pytest
import torch
from tensors import check_samples_and_limit, random_rows

from kd_mm.losses.rkd import angles, relative_distances
from kd_mm.registry import build


def value(student, teacher, batch=None, **options):
    return build(dict(type='RKDLoss', **options))(student, teacher, batch).item()


def line(*points):
    return torch.tensor(points).double()[:, None]


def test_distances_by_hand():
    # Distances 1, 3, 2 with mean 2; and 1, 2, 1 with mean 4/3.
    student, teacher = line(0.0, 1.0, 3.0), line(0.0, 1.0, 2.0)
    assert relative_distances(student)[0].tolist() == pytest.approx([0.0, 0.5, 1.5])
    gaps = [0.5 - 0.75, 1.5 - 1.5, 1.0 - 0.75]
    expected = 2 * sum(0.5 * gap**2 for gap in gaps) / 9
    assert value(student, teacher, distance_weight=2.0, angle_weight=0) == pytest.approx(2 * expected, rel=1e-12)
    # Beyond beta h is linear.
    linear = 2 * sum(abs(gap) - 0.05 for gap in gaps if gap) / 9
    assert value(student, teacher, distance_weight=1, angle_weight=0, beta=0.1) == pytest.approx(linear, rel=1e-12)


def test_angles_by_hand():
    # A right angle at sample 0 against all three on a line, with 0 between the others.
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    straight = line(0.0, 1.0, -1.0)
    half = 0.5**0.5
    found = angles(corner)
    assert found[0, 1, 2].item() == 0.0 and found[1, 0, 2].item() == pytest.approx(half)
    assert angles(straight)[0, 1, 2].item() == -1.0 and angles(straight)[1, 0, 2].item() == 1.0
    expected = (2 * 0.5 * 1 + 4 * 0.5 * (1 - half)**2) / 27
    assert value(corner, straight, distance_weight=0, angle_weight=3.0) == pytest.approx(3 * expected, rel=1e-9)


def test_the_total_weighs_the_terms():
    student, teacher = random_rows(6, 3), random_rows(6, 5)
    parts = [value(student, teacher, distance_weight=d, angle_weight=a) for d, a in ((25, 0), (0, 50))]
    assert value(student, teacher, loss_weight=0.5) == pytest.approx(0.5 * sum(parts), rel=1e-12) and min(parts) > 0


def test_relations_see_no_shift_no_rotation_no_scale():
    student, teacher = random_rows(2, 4, 3, 3), random_rows(2, 6, 3, 3)
    rotation = torch.linalg.qr(random_rows(4, 4))[0]
    turned = 3 * torch.einsum('nchw,cd->ndhw', student, rotation) + random_rows(4)[None, :, None, None]
    assert value(turned, teacher) == pytest.approx(value(student, teacher), rel=1e-9)
    normed = dict(normalize=True)
    assert value(turned, teacher, **normed) != pytest.approx(value(student, teacher, **normed), rel=1e-6)
    assert value(3 * student, teacher, **normed) == pytest.approx(value(student, teacher, **normed), rel=1e-9)


def test_equal_samples_have_a_finite_gradient():
    student = torch.ones(5, 3, requires_grad=True)
    total = build(dict(type='RKDLoss'))(student, torch.randn(5, 4))
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(student.grad).all()


def test_two_images_have_no_relation():
    student, teacher = random_rows(2, 4, 3, 3), random_rows(2, 6, 3, 3)
    assert value(student, teacher, samples='image') == pytest.approx(0.0, abs=1e-12)
    assert value(student, teacher) > 0.1


def test_samples_and_limit():
    check_samples_and_limit(value)


@pytest.mark.parametrize('options', [
    dict(distance_weight=-1), dict(angle_weight=-1), dict(beta=0), dict(samples='pixel'), dict(limit=1)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='RKDLoss', **options))
