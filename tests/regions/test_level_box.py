import pytest
import torch

from kd_mm.regions.level_box import LevelBoxRegion, box_level, inner_cells
from kd_mm.types.batch import KDBatch


def test_levels_by_size():
    edges = torch.tensor([1.0, 55.0, 110.0, 111.0, 223.0, 5000.0])
    boxes = torch.stack([edges * 0, edges * 0, edges, edges], dim=1)
    assert box_level(boxes, 3).tolist() == [0, 0, 0, 1, 2, 2]
    assert box_level(torch.zeros(1, 4), 3).tolist() == [0]
    assert box_level(torch.tensor([[5.0, 5.0, 0.0, 0.0]]), 3).isfinite().all()


def test_cells_are_cut_and_an_empty_box_has_one():
    boxes = torch.tensor([[[9.0, 0.0, 31.9, 32.0], [17.0, 9.0, 22.0, 30.0], [32.0, 32.0, 33.0, 33.0],
                           [-9.0, -9.0, 60.0, 60.0]]])
    assert inner_cells(boxes, (8, 8), (4, 4)).tolist() == [
        [[1, 0, 3, 4], [2, 1, 3, 2], [3, 3, 4, 4], [0, 0, 4, 4]]]


def test_masks():
    batch = KDBatch(input_shape=(256, 256), boxes=[
        torch.tensor([[0.0, 0.0, 64.0, 32.0], [100.0, 100.0, 228.0, 228.0]]), torch.zeros(0, 4)])
    features = (torch.zeros(2, 4, 16, 16), torch.zeros(2, 4, 8, 8))
    first, second = LevelBoxRegion()(features, batch)
    assert first[0].sum() == 8 and first[0, 0, :2, :4].sum() == 8
    assert second[0].sum() == 16 and second[0, 0, 3:7, 3:7].sum() == 16
    assert first[1].sum() == second[1].sum() == 0
    strided, _ = LevelBoxRegion(strides=[32, 32])(features, batch)
    assert strided[0].sum() == 2
    every, none = LevelBoxRegion(scale=1000)(features, batch)
    assert every[0].sum() == 8 + 64 and none.sum() == 0


def test_bad_options():
    with pytest.raises(ValueError, match='scale'):
        LevelBoxRegion(scale=0)
    with pytest.raises(ValueError, match='strides'):
        LevelBoxRegion(strides=[-1])
    with pytest.raises(ValueError, match='1 strides for 2 levels'):
        LevelBoxRegion(strides=[8])((torch.zeros(1, 4, 4, 4), ) * 2, KDBatch(input_shape=(32, 32)))
