import pytest
import torch

from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

BATCH = KDBatch(input_shape=(32, 32), boxes=[torch.tensor([[0.0, 0.0, 16.0, 16.0], [16.0, 16.0, 32.0, 32.0]])])


def maps(*values):
    """4 x 4 cells: the upper left quarter, the lower right one, the others 9."""
    features = torch.full((1, 3, 4, 4), 9.0)
    features[..., :2, :2], features[..., 2:, 2:] = values
    return features


def test_closed_form():
    student, zero = maps(2.0, 4.0), torch.zeros(1, 3, 4, 4)
    # Samples lie in the middle of a box's parts; with one part of one sample none looks beyond the box's cells.
    found = build(dict(type='MimicLoss', size=1))(student, zero, BATCH)
    assert found.item() == pytest.approx((4 + 16) / 2 / 2)


def test_boxes_on_their_level():
    batch = KDBatch(input_shape=(32, 32), boxes=[torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 32.0, 32.0]])])
    student = (torch.full((1, 3, 4, 4), 2.0), torch.full((1, 3, 2, 2), 4.0))
    zero = tuple(torch.zeros_like(level) for level in student)
    loss = build(dict(type='MimicLoss', assign='size', scale=10.0))
    assert [term.item() for term in loss.per_level(student, zero, batch)] == pytest.approx([2.0, 8.0])
    large = build(dict(type='MimicLoss', assign='size', scale=100.0))
    assert [term.item() for term in large.per_level(student, zero, batch)] == pytest.approx([2.0, 0.0])


def test_without_boxes_it_is_zero_and_connected():
    student = torch.randn(1, 3, 4, 4, requires_grad=True)
    total = build(dict(type='MimicLoss'))(student, torch.randn(1, 3, 4, 4), KDBatch(
        input_shape=(32, 32), boxes=[torch.zeros(0, 4)]))
    total.backward()
    assert total.item() == 0 and student.grad.abs().sum() == 0


@pytest.mark.parametrize('options', [dict(size=0), dict(assign='one'), dict(scale=0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='MimicLoss', **options))
