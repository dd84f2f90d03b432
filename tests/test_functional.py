import pytest
import torch

from kd_mm import functional as F


def test_lift():
    assert [F.lift(torch.zeros(1, dtype=d)).dtype for d in (torch.float16, torch.bfloat16, torch.float32,
                                                             torch.float64)] == [torch.float32] * 3 + [torch.float64]


def test_parameter_options():
    assert F.parameter_options(torch.zeros(2, dtype=torch.float64)) == {
        'device': torch.device('cpu'), 'dtype': torch.float64}


def test_weighted_mean():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 2, 1, 2).requires_grad_()
    assert F.weighted_mean(values).item() == 2.5
    assert F.weighted_mean(values, torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)).item() == (1 + 3 + 3 * 2 + 3 * 4) / 8
    empty = F.weighted_mean(values, torch.zeros(1, 1, 1, 2))
    empty.backward()
    assert empty.item() == 0.0 and values.grad.abs().sum() == 0
    small = torch.full((1, 1, 1, 2), 1e-3)
    assert F.weighted_mean(values, small).item() == pytest.approx(2.5)
    assert F.weighted_mean(values[:0]).item() == 0.0


def test_safe_sqrt():
    x = torch.tensor([0.0, 9.0], requires_grad=True)
    root = F.safe_sqrt(x)
    root.sum().backward()
    assert root.tolist() == [0.0, 3.0] and x.grad.tolist() == pytest.approx([0.0, 1 / 6])


def test_resize_keeps_equal_sizes():
    x = torch.randn(1, 2, 4, 4)
    assert F.resize(x, (4, 4)) is x
    assert torch.equal(F.resize(x, (8, 4)), torch.nn.functional.interpolate(x, (8, 4), mode='bilinear'))


def test_apply_weights():
    x = torch.ones(1, 2, 1, 2, dtype=torch.float64)
    assert F.apply_weights(x, None) is x
    weighted = F.apply_weights(x, torch.tensor([0.0, 2.0]).view(1, 1, 1, 2))
    assert weighted.dtype == torch.float64 and weighted.flatten().tolist() == [0.0, 2.0, 0.0, 2.0]


def test_checks():
    assert F.one_of('X', 'mode', 'a', ('a', 'b')) == 'a' and F.positive('X', 'tau', 2) == 2.0
    with pytest.raises(ValueError, match="X: mode='c' is not one of 'a', 'b'"):
        F.one_of('X', 'mode', 'c', ('a', 'b'))
    for bad in (0, -1, float('nan')):
        with pytest.raises(ValueError, match='must be above 0'):
            F.positive('X', 'tau', bad)


def test_overlap_and_giou():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    others = torch.tensor([[1.0, 1, 3, 3], [3, 0, 4, 1], [0, 0, 0, 0]], dtype=torch.float64)
    overlap, union = F.intersection(boxes, others)
    assert overlap.tolist() == [1, 0, 0] and union.tolist() == [7, 2, 0]
    loss = F.giou_loss(boxes, others)
    # 1 of 7, hull 9; apart, hull 4; nothing at all
    assert loss[:2].tolist() == pytest.approx([1 - (1 / 7 - 2 / 9), 1 - (0 - 2 / 4)])
    loss.sum().backward()
    assert torch.isfinite(boxes.grad).all() and boxes.grad[1, 2] < 0  # apart, and yet it says where to go
    assert F.giou_loss(others, others)[:2].abs().max() == 0
    inverted = torch.tensor([9.0, 9.0, 1.0, 2.0])  # empty, and no negative area
    assert 0 < F.giou_loss(inverted, torch.tensor([0.0, 0.0, 10.0, 10.0])) <= 2
