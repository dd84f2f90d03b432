from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kd_mm.hosts.samples import Samples
from kd_mm.regions.gt_mask import GTMaskRegion
from kd_mm.types.batch import KDBatch, Targets

FEATURES = (torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 2, 2))


def masks():
    """One object over a cell and a half, one over the same; none in the second image."""
    first = torch.zeros(2, 16, 16)
    first[0, :8, :8], first[1, :8, 4:12] = 1, 1
    return [first, torch.zeros(0, 16, 16)]


def test_by_hand():
    batch = KDBatch(input_shape=(32, 32), masks=masks())
    fine, coarse = GTMaskRegion()(FEATURES, batch)
    assert fine[0, 0, 0].tolist() == [1, 0.5, 0, 0] and fine[0].sum() == 1.5 and fine[1].sum() == 0
    assert coarse[0, 0, 0, 0].item() == pytest.approx(1.5 / 4)
    fine, coarse = GTMaskRegion('foreground')(FEATURES, batch)
    assert fine[0].sum() == 1 and coarse.sum() == 0  # half a cell is not more than half
    outside, _ = GTMaskRegion('background')(FEATURES, batch)
    assert torch.equal(outside, 1 - fine)


def test_mmdets_masks():
    from mmdet.structures.mask import BitmapMasks, PolygonMasks
    from mmengine.structures import InstanceData
    square = [np.array([0, 0, 16, 0, 16, 8, 0, 8], dtype=np.float64)]
    bitmaps = BitmapMasks(masks()[0].numpy().astype(np.uint8), 16, 16)
    samples = [SimpleNamespace(gt_instances=InstanceData(masks=bitmaps)),
               SimpleNamespace(gt_instances=InstanceData(masks=PolygonMasks([square], 16, 16)))]
    fine, _ = GTMaskRegion()(FEATURES, KDBatch(Targets((32, 32), source=Samples(samples))))
    assert fine[0].sum() == 1.5 and fine[1, 0, 0].tolist() == [1, 1, 0, 0]


def test_errors():
    with pytest.raises(ValueError, match='with_mask=True'):
        GTMaskRegion()(FEATURES, KDBatch(Targets((32, 32), source=Samples([SimpleNamespace()] * 2))))
    with pytest.raises(ValueError, match='masks of 1 images for features of 2'):
        GTMaskRegion()(FEATURES, KDBatch(input_shape=(32, 32), masks=masks()[:1]))
    with pytest.raises(ValueError, match='mode'):
        GTMaskRegion('hard')
