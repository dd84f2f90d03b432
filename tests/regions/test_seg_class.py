import pytest
import torch

from kd_mm.regions import SegClassRegion
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

LABELS = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 255, 255], [2, 2, 255, 255]]], dtype=torch.uint8)


def mask(size=(2, 2), **options):
    return SegClassRegion(**options)((torch.zeros(1, 3, *size), ), KDBatch(seg_map=LABELS))[0]


def test_cells_of_some_classes():
    assert mask(classes=[0, 2]).tolist() == [[[[1, 0], [1, 0]]]]
    assert mask(classes=[1]).tolist() == [[[[0, 1], [0, 0]]]]
    assert mask(classes=[9]).sum() == 0


def test_all_labelled_pixels_by_default():
    assert mask().tolist() == [[[[1, 1], [1, 0]]]]


def test_ignored_pixels_never_count():
    assert mask(classes=[255]).sum() == 0
    other = SegClassRegion(classes=[255])((torch.zeros(1, 3, 2, 2), ), KDBatch(seg_map=LABELS, ignore_index=0))[0]
    assert other.sum() == 1


def test_the_nearest_pixel_labels_a_cell():
    assert mask((4, 4), classes=[2])[0, 0, 2:, :2].sum() == 4
    assert mask((1, 1), classes=[0]).item() == 1.0
    assert mask((3, 3), classes=[1]).tolist() == [[[[0, 0, 1], [0, 0, 1], [0, 0, 0]]]]


def test_errors():
    with pytest.raises(ValueError, match=r'classes=\[\] must be a list that is not empty'):
        build(dict(type='SegClassRegion', classes=[]))
    with pytest.raises(ValueError, match='segmentation map'):
        SegClassRegion()((torch.zeros(1, 3, 2, 2), ), KDBatch())
