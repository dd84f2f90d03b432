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


def test_unit_vectors():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    unit = F.unit_vectors(x)
    assert unit.tolist() == [pytest.approx([0.6, 0.8]), [0.0, 0.0]]
    unit.sum().backward()
    # Along itself a vector's length does not matter; the zero vector lets a gradient of ordinary size through.
    assert x.grad[0].tolist() == pytest.approx([0.2 - 0.6 * 1.4 / 5, 0.2 - 0.8 * 1.4 / 5])
    assert x.grad[1].abs().max() <= 1
    y = torch.randn(2, 5, 3).double()
    assert torch.allclose(F.unit_vectors(y, 1), torch.nn.functional.normalize(y, dim=1), rtol=1e-14)


def test_seeded_generator():
    draws = [torch.rand(4, generator=F.seeded_generator(*numbers)) for numbers in ((1, 23), (1, 23), (12, 3))]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_keep_mask():
    assert F.keep_mask(torch.tensor([0.24, 0.25, 0.26]), 0.75).tolist() == [1.0, 1.0, 0.0]
