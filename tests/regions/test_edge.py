import pytest
import torch

from kd_mm.regions import EdgeRegion
from kd_mm.regions.edge import class_edges, label_edges, window_classes
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def mask(labels, size, dtype=torch.float32, **options):
    batch = KDBatch(seg_map=torch.tensor(labels, dtype=torch.uint8)[None])
    return EdgeRegion(**options)((torch.zeros(1, 3, *size, dtype=dtype), ), batch)[0]


SQUARE = [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 7, 7, 0, 0], [0, 0, 7, 7, 0, 0], [0, 0, 0, 0, 0, 0],
          [0, 0, 0, 0, 0, 0]]


def test_a_square():
    edge = mask(SQUARE, (6, 6), width=3)
    assert edge[0, 0, 1:5, 1:5].sum() == 16 and edge.sum() == 16
    body = mask(SQUARE, (6, 6), mode='body', width=3)
    assert torch.equal(body, 1 - edge)
    assert mask(SQUARE, (6, 6), width=5).sum() == 36


def test_cells_hold_the_share_of_their_pixels():
    assert mask(SQUARE, (3, 3), width=3)[0, 0].tolist() == [[0.25, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 0.25]]
    assert mask(SQUARE, (3, 3), width=3, dtype=torch.float64).dtype == torch.float64
    assert mask(SQUARE, (3, 3), width=3, dtype=torch.float16).dtype == torch.float32


def test_ignored_pixels_make_no_edge():
    labels = [[0, 0, 255, 255, 1, 1]]
    assert mask(labels, (1, 6), width=3).sum() == 0
    assert mask(labels, (1, 6), width=3, mode='body').flatten().tolist() == [1, 1, 0, 0, 1, 1]
    assert mask(labels, (1, 6), width=7).flatten().tolist() == [0, 1, 0, 0, 1, 0]
    other = KDBatch(seg_map=torch.tensor(labels)[None], ignore_index=1)
    found = EdgeRegion(width=3)((torch.zeros(1, 3, 1, 6), ), other)[0]
    assert found.flatten().tolist() == [0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize('width', [3, 5, 7, 11])
def test_edges_of_classes_are_dilation_less_erosion(width):
    """Of 19 classes: three words of eight bits."""
    labels = torch.randint(0, 19, (2, 9, 12), generator=torch.Generator().manual_seed(1))
    labels = labels.repeat_interleave(3, 1).repeat_interleave(3, 2)
    mixed, known = label_edges(labels, width, 255)
    found = class_edges(window_classes(labels, mixed, 19, width), torch.arange(19), (27, 36))
    pool = torch.nn.MaxPool2d(width, 1, width // 2)
    for label in range(19):
        own = (labels == label).float()[:, None]
        erosion = 1 - pool(1 - own)
        assert torch.equal(found[:, label:label + 1], pool(own) - erosion)
    assert bool(known.all()) and found.any(dim=1).any()
    assert torch.equal(class_edges(window_classes(labels, mixed, 19, width), torch.tensor([17, 3]), (27, 36)),
                       found[:, [17, 3]])


@pytest.mark.parametrize('ignored', [255, -100, 9])
def test_an_ignored_label_is_no_class(ignored):
    labels = torch.tensor([[[0, 0, ignored, 9, 9]]]) if ignored != 9 else torch.tensor([[[0, 0, 9, 8, 8]]])
    mixed, _ = label_edges(labels, 5, ignored)
    edges = class_edges(window_classes(labels, mixed, 10, 5), torch.arange(10), (1, 5))[0, :, 0]
    other = 8 if ignored == 9 else 9
    assert edges[0].tolist() == edges[other].tolist() == [0, 1, 0, 1, 0]
    assert edges.any(dim=1).sum() == 2 + (ignored == 9)


@pytest.mark.parametrize('options', [dict(mode='inside'), dict(width=4), dict(width=1), dict(width=3.5)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='EdgeRegion', **options))


def test_labels_are_needed():
    with pytest.raises(ValueError, match='segmentation map'):
        EdgeRegion()((torch.zeros(1, 3, 2, 2), ), KDBatch())
