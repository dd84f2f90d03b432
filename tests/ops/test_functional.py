import pytest
import torch

from kd_mm.ops import checks
from kd_mm.ops import functional as F
from kd_mm.ops.boxes import giou_loss, intersection
from kd_mm.ops.sampling import draw, keep_mask, relation_rows, seeded_generator


def test_a_root_of_what_is_no_number_is_none():
    found = F.safe_sqrt(torch.tensor([float('nan'), 4.0, 0.0, -1.0]))
    assert bool(found[0].isnan()) and found[1:].tolist() == [2.0, 0.0, 0.0]


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
    assert checks.one_of('X', 'mode', 'a', ('a', 'b')) == 'a' and checks.positive('X', 'tau', 2) == 2.0
    with pytest.raises(ValueError, match="X: mode='c' is not one of 'a', 'b'"):
        checks.one_of('X', 'mode', 'c', ('a', 'b'))
    for bad in (0, -1, float('nan')):
        with pytest.raises(ValueError, match='above 0'):
            checks.positive('X', 'tau', bad)


def test_unit_norm():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    unit = F.unit_norm(x)
    assert unit.tolist() == [pytest.approx([0.6, 0.8]), [0.0, 0.0]]
    unit.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_draw_takes_the_weighted_ones():
    weights = torch.zeros(50)
    weights[10:20] = 1.0
    assert draw(weights, None, seeded_generator(0)).tolist() == list(range(10, 20))
    assert draw(weights, 10, seeded_generator(0)).tolist() == list(range(10, 20))
    chosen = draw(weights, 4, seeded_generator(0))
    assert chosen.unique().numel() == 4 and ((chosen >= 10) & (chosen < 20)).all()
    assert torch.equal(chosen, draw(weights.double(), 4, seeded_generator(0)))
    assert not torch.equal(chosen, draw(weights, 4, seeded_generator(1)))
    # Entry 0 has half of all weight, so it is half of all single draws.
    weights = torch.ones(101)
    weights[0] = 100.0
    first = [0 in draw(weights, 1, seeded_generator(seed)).tolist() for seed in range(200)]
    assert 70 < sum(first) < 130


def test_relation_rows_of_cells():
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    mask = torch.zeros(2, 1, 4, 5)
    mask[1, 0, 2, 3] = mask[0, 0, 1, 4] = 0.5
    student, teacher = relation_rows(x, -x, mask, 'cell', 7, seeded_generator(0))
    assert torch.equal(student, torch.stack([x[0, :, 1, 4], x[1, :, 2, 3]])) and torch.equal(teacher, -student)
    student, teacher = relation_rows(x, 2 * x, None, 'cell', 7, seeded_generator(0))
    assert student.shape == (7, 3) and torch.equal(teacher, 2 * student)
    rows = torch.randn(9, 4)
    assert torch.equal(relation_rows(rows, rows, None, 'cell', None, seeded_generator(0))[0], rows)
    assert relation_rows(rows, rows, None, 'cell', 5, seeded_generator(0))[0].shape == (5, 4)


def test_relation_rows_of_images():
    x, mask = torch.ones(3, 2, 2, 2), torch.zeros(3, 1, 2, 2)
    mask[0, 0, 0, 0], mask[2] = 1.0, 1.0
    student, teacher = relation_rows(x, x, mask, 'image', None, seeded_generator(0))
    assert student.tolist() == [[1, 0, 0, 0] * 2, [1] * 8] and torch.equal(student, teacher)
    assert relation_rows(x, torch.ones(3, 5, 4, 4), None, 'image', None, seeded_generator(0))[1].shape == (3, 80)


@pytest.mark.parametrize('limit', [1, 0, 2.5, True, 'all'])
def test_sample_limit(limit):
    with pytest.raises(ValueError, match='limit='):
        checks.sample_limit('X', limit)
    assert checks.sample_limit('X', None) is None


def test_unit_vectors():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y = F.unit_vectors(x, dim=1)
    assert y.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    assert F.unit_vectors(x, dim=1, eps=5.0)[0].tolist() == pytest.approx([0.3, 0.4])
    (y * torch.tensor([[1.0, 2.0], [1.0, 2.0]])).sum().backward()
    # Along the vector itself the gradient is zero.
    assert (x.grad[0] * x.detach()[0]).sum().item() == pytest.approx(0.0, abs=1e-12)
    assert torch.isfinite(x.grad).all()


def test_attention_vector():
    x = torch.tensor([[[[0.0, -2.0]], [[2**0.5, 2.0]]]])  # mean squares 1 and 4
    assert F.attention_vector(x).tolist() == [pytest.approx([1 / 17**0.5, 4 / 17**0.5])]
    assert F.attention_vector(2**0.5 * x, p=1.0).tolist() == [pytest.approx([1 / 9**0.5, 8**0.5 / 9**0.5])]
    assert F.attention_vector(x, mask=torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)).tolist() == [[0.0, 1.0]]
    assert F.attention_vector(x, mask=torch.zeros(1, 1, 1, 2)).tolist() == [[0.0, 0.0]]
    wide = x.repeat_interleave(2, dim=3)  # mean squares 1 1 4 4
    assert F.attention_vector(wide, size=(1, 2)).tolist() == [pytest.approx([1 / 17**0.5, 4 / 17**0.5])]


def test_channel_affinity():
    x = torch.tensor([[[[1.0, 1.0]], [[0.0, 1.0]]]])  # channels (1, 1) and (0, 1): products 2, 1, 1
    gram = F.channel_affinity(x)[0]
    assert gram.flatten().tolist() == pytest.approx([2 / 5**0.5, 1 / 5**0.5, 1 / 2**0.5, 1 / 2**0.5])
    part = F.channel_affinity(x, torch.tensor([3.0, 0.0]).view(1, 1, 1, 2))[0]
    assert part.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_spatial_log_softmax():
    x = torch.zeros(2, 1, 1, 3)
    log_p, filled = F.spatial_log_softmax(x)
    assert filled is None and log_p.exp().sum(dim=2).flatten().tolist() == pytest.approx([1.0, 1.0])
    mask = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]]).view(2, 1, 1, 3)
    log_p, filled = F.spatial_log_softmax(x, 2.0, mask)
    assert filled.tolist() == [[True], [False]]
    assert log_p[0].exp().flatten().tolist() == pytest.approx([0.25, 0.75, 0.0])
    assert torch.isfinite(log_p).all()
    scaled, _ = F.spatial_log_softmax(torch.tensor([0.0, 4.0]).view(1, 1, 1, 2), 4.0)
    assert (scaled[0, 0, 1] - scaled[0, 0, 0]).item() == pytest.approx(1.0)


def test_class_centres():
    features = torch.tensor([[[1.0, 3.0, 5.0], [0.0, 2.0, 9.0]]])
    members = torch.tensor([[[1.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]])
    centres, counts = F.class_centres(features, members)
    assert centres.tolist() == [[[2.5, 5.0, 0.0], [1.5, 9.0, 0.0]]] and counts.tolist() == [[4.0, 2.0, 0.0]]


def test_cell_mean():
    values = torch.tensor([[1.0, 3.0], [10.0, 30.0]]).view(1, 2, 1, 2)
    mask = torch.tensor([3.0, 1.0]).view(1, 1, 1, 2)
    assert F.cell_mean(values).item() == pytest.approx(22.0)
    assert F.cell_mean(values, mask).item() == pytest.approx((3 * 11 + 33) / 4)
    assert F.cell_mean(values, 0 * mask).item() == 0.0


def test_unit_vectors_of_zero():
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
    draws = [torch.rand(4, generator=seeded_generator(*numbers)) for numbers in ((1, 23), (1, 23), (12, 3))]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_keep_mask():
    assert keep_mask(torch.tensor([0.24, 0.25, 0.26]), 0.75).tolist() == [1.0, 1.0, 0.0]


def test_overlap_and_giou():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    others = torch.tensor([[1.0, 1, 3, 3], [3, 0, 4, 1], [0, 0, 0, 0]], dtype=torch.float64)
    overlap, union = intersection(boxes, others)
    assert overlap.tolist() == [1, 0, 0] and union.tolist() == [7, 2, 0]
    loss = giou_loss(boxes, others)
    # 1 of 7, hull 9; apart, hull 4; nothing at all
    assert loss[:2].tolist() == pytest.approx([1 - (1 / 7 - 2 / 9), 1 - (0 - 2 / 4)])
    loss.sum().backward()
    assert torch.isfinite(boxes.grad).all() and boxes.grad[1, 2] < 0  # apart, and yet it says where to go
    assert giou_loss(others, others)[:2].abs().max() == 0
    inverted = torch.tensor([9.0, 9.0, 1.0, 2.0])  # empty, and no negative area
    assert 0 < giou_loss(inverted, torch.tensor([0.0, 0.0, 10.0, 10.0])) <= 2
