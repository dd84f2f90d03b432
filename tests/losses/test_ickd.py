import pytest
import torch
from tensors import Given, draw

from kd_mm.losses.ickd import into_patches
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def value(student, teacher, region=None, **options):
    return build(dict(type='ICKDLoss', **options))(student, teacher, KDBatch(), region).item()


def test_closed_form():
    # Channels at right angles: rows (1, 0) and (0, 1); equal channels: rows (1, 1) / sqrt(2).
    student = torch.eye(2).view(1, 2, 1, 2).double()
    teacher = torch.ones(1, 2, 1, 2).double()
    row = (1 - 0.5**0.5)**2 + 0.5
    assert value(student, teacher) == pytest.approx(row)
    assert value(student.repeat(3, 1, 1, 1), teacher.repeat(3, 1, 1, 1)) == pytest.approx(row)
    assert value(7 * student, -2 * teacher) == pytest.approx(row)


def test_where_things_are_does_not_matter():
    student, teacher = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    assert value(student.flip(2), teacher) == pytest.approx(value(student, teacher), rel=1e-12)
    assert value(student.flip(2), teacher, patches=2) != pytest.approx(value(student, teacher, patches=2), rel=1e-3)
    tall = student.repeat_interleave(2, 2)
    assert value(tall, teacher) == pytest.approx(value(student, teacher), rel=1e-12)


def test_patches():
    pieces = into_patches(torch.arange(12.0).view(1, 1, 3, 4), 2)
    assert pieces.flatten(1).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 0, 0], [10, 11, 0, 0]]
    student, teacher = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    cut = [torch.cat([side[:, :, top:top + 2, left:left + 3] for top in (0, 2) for left in (0, 3)])
           for side in (student, teacher)]
    assert value(student, teacher, patches=2) == pytest.approx(value(*cut), rel=1e-12)


def test_region_is_the_loss_of_its_cells():
    student, teacher = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, :2, :3] = 2.0
    expected = value(student[:, :, :2, :3], teacher[:, :, :2, :3])
    assert value(student, teacher, Given(mask)) == pytest.approx(expected, rel=1e-12)
    assert value(student, teacher, Given(mask), patches=2) == pytest.approx(expected, rel=1e-12)
    mask[1] = 0
    expected = value(student[:1, :, :2, :3], teacher[:1, :, :2, :3])
    assert value(student, teacher, Given(mask)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('patches', [0, 1.5])
def test_bad_options(patches):
    with pytest.raises(ValueError, match='patches'):
        build(dict(type='ICKDLoss', patches=patches))
