import pytest
import torch
from tensors import Given, draw

from kd_mm.losses.cwd import channel_wise_divergence
from kd_mm.ops.divergences import softmax_divergence
from kd_mm.regions import EdgeRegion
from kd_mm.regions.edge import class_edges, label_edges, window_classes
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def value(student, teacher, batch, region=None, **options):
    return build(dict(type='BPKDLoss', width=3, **options))(student, teacher, batch, region).item()


#: The edge is the two columns in the middle, for both classes; class 2 is nowhere.
TWO = KDBatch(seg_map=torch.tensor([0, 0, 0, 1, 1, 1]).expand(2, 4, 6))


def test_edges_are_the_pixel_loss_there():
    student, teacher = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    pixels = build(dict(type='SoftmaxKDLoss', tau=2.0))(student[..., 2:4], teacher[..., 2:4]).item()
    assert value(student, teacher, TWO, edge=3.0, body=0.0, tau=2.0) == pytest.approx(3 * pixels)
    # Outside of the edge nothing counts.
    moved = student.clone()
    moved[..., :2] += draw(2, 3, 4, 2)
    assert value(moved, teacher, TWO, body=0.0) == pytest.approx(value(student, teacher, TWO, body=0.0))


def test_bodies_are_the_channel_wise_loss_there():
    student, teacher = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    cut = [tensor[..., [0, 1, 4, 5]] for tensor in (student, teacher)]
    two = build(dict(type='CWDLoss', tau=2.0, loss_weight=1.0))(*(side[:, :2] for side in cut)).item()
    # The third class has no edge, so its body is the whole map.
    whole = build(dict(type='CWDLoss', tau=2.0, loss_weight=1.0))(student[:, 2:], teacher[:, 2:]).item()
    expected = (2 * two + whole) / 3
    assert value(student, teacher, TWO, edge=0.0, body=5.0, tau=2.0) == pytest.approx(5 * expected)


def test_an_image_without_labels_does_not_count():
    student, teacher = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    labels = TWO.targets.seg_map.clone()
    labels[1] = 255
    first = value(student[:1], teacher[:1], KDBatch(seg_map=labels[:1]))
    assert value(student, teacher, KDBatch(seg_map=labels)) == pytest.approx(first, rel=1e-12)


def test_the_classes_count_the_same():
    # Class 2 has a single edge between it and class 0, in one column of the second image only.
    labels = TWO.targets.seg_map.clone()
    labels[1, :, :3] = 2
    batch = KDBatch(seg_map=labels)
    student, teacher = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    pixel = build(dict(type='SoftmaxKDLoss'))
    images = [pixel(student[i:i + 1, ..., 2:4], teacher[i:i + 1, ..., 2:4]).item() for i in (0, 1)]
    expected = (images[0] + (images[0] + images[1]) / 2 + images[1]) / 3
    assert value(student, teacher, batch, body=0.0) == pytest.approx(expected)


@pytest.mark.parametrize('block', [10, 2**20])
def test_each_image_has_bodies_of_its_own(block, monkeypatch):
    monkeypatch.setattr('kd_mm.ops.blocks.BLOCK', block)
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[0, :, 3:], labels[1, 5:] = 1, 1
    student, teacher = draw(2, 2, 8, 8), draw(2, 2, 8, 8, seed=1)
    loss = build(dict(type='BPKDLoss', width=3))
    both = loss.terms(student, teacher, KDBatch(seg_map=labels), None)['body']
    each = [loss.terms(student[i:i + 1], teacher[i:i + 1], KDBatch(seg_map=labels[i:i + 1]), None)['body']
            for i in (0, 1)]
    assert both.item() == pytest.approx((each[0] + each[1]).item() / 2, rel=1e-12)


def test_cells_share_edge_and_body():
    # Cells of two pixels: labels 0 0 | 0 0 | 1 1 | ignored; half of the cells beside the edge lie at it.
    batch = KDBatch(seg_map=torch.tensor([[[0, 0, 0, 0, 1, 1, 255, 255]]]))
    mixed, _ = label_edges(batch.targets.seg_map, 3, 255)
    edges = class_edges(window_classes(batch.targets.seg_map, mixed, 2, 3), torch.arange(2), (1, 4))
    assert edges[0, :, 0].tolist() == [[0, 0.5, 0.5, 0], [0, 0.5, 0.5, 0]]
    student, teacher = draw(1, 2, 1, 4), draw(1, 2, 1, 4, seed=1)
    terms = build(dict(type='BPKDLoss', width=3)).terms(student, teacher, batch, None)
    pixels = softmax_divergence(student, teacher).sum(dim=1).flatten()
    assert terms['edge'].item() == pytest.approx(pixels[1:3].mean().item(), rel=1e-12)
    bodies = torch.tensor([[1, 0.5, 0.5, 0]] * 2).double().view(1, 2, 1, 4)
    rows = channel_wise_divergence(student, teacher, mask=bodies)
    assert terms['body'].item() == pytest.approx(rows.mean().item(), rel=1e-12)


def test_chunks_of_classes_do_not_change_the_numbers(monkeypatch):
    batch = KDBatch(seg_map=torch.randint(0, 7, (2, 8, 8), generator=torch.Generator().manual_seed(0)))
    student, teacher = draw(2, 7, 4, 4), draw(2, 7, 4, 4, seed=1)
    loss = build(dict(type='BPKDLoss', width=3))
    whole = loss.terms(student, teacher, batch, None)
    monkeypatch.setattr('kd_mm.regions.edge.BLOCK', 3 * 128)
    monkeypatch.setattr('kd_mm.ops.blocks.BLOCK', 2 * 32)
    parts = loss.terms(student, teacher, batch, None)
    assert all(torch.isclose(parts[name], whole[name], rtol=1e-12) for name in ('edge', 'body'))


def test_region_multiplies_the_shares():
    student, teacher = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, :2] = 2.0
    top = KDBatch(seg_map=TWO.targets.seg_map[:, :2])
    expected = value(student[:, :, :2], teacher[:, :, :2], top)
    assert value(student, teacher, TWO, Given(mask)) == pytest.approx(expected, rel=1e-10)


def test_nothing_labelled_is_zero():
    student = draw(1, 3, 2, 2).requires_grad_()
    loss = build(dict(type='BPKDLoss'))(student, draw(1, 3, 2, 2), KDBatch(seg_map=torch.full((1, 2, 2), 255)))
    loss.backward()
    assert loss.item() == 0.0 and student.grad.abs().sum() == 0
    with pytest.raises(ValueError, match='segmentation map'):
        value(student, student, KDBatch())
    with pytest.raises(ValueError, match='needs maps'):
        value(draw(4, 3), draw(4, 3), TWO)


def test_any_loss_takes_the_edge():
    student, teacher = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    found = build(dict(type='SoftmaxKDLoss'))(student, teacher, TWO, EdgeRegion(width=3)).item()
    assert found == pytest.approx(value(student, teacher, TWO, body=0.0))


@pytest.mark.parametrize('options', [dict(edge=-1), dict(body=float('nan')), dict(tau=0), dict(width=4)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='BPKDLoss', **options))
