import math

import pytest
import torch

from kd_mm.regions.gaussian import GaussianBoxRegion
from kd_mm.regions.gt_box import BLOCK
from kd_mm.types.batch import KDBatch


def mask(boxes, size=(4, 8), frame=(32, 64), **options):
    batch = KDBatch(input_shape=frame, boxes=[torch.tensor(boxes).reshape(-1, 4)], labels=[torch.arange(len(boxes))])
    return GaussianBoxRegion(**options)((torch.zeros(1, 8, *size), ), batch)[0]


def test_by_hand():
    # Centre of cell (1, 2), 24 wide and 8 high: one cell beside it is 8 / 6 deviations away.
    found = mask([[8.0, 8.0, 32.0, 16.0]])
    assert found.shape == (1, 1, 4, 8) and found[0, 0, 1, 2] == 1.0
    assert found[0, 0, 1, 1].item() == pytest.approx(math.exp(-(8 / 6)**2 / 2))
    assert found.count_nonzero() == 3
    wide = mask([[8.0, 8.0, 32.0, 16.0]], inside=False, spread=1.0)
    assert wide.count_nonzero() == 32 and wide[0, 0, 0, 2].item() == pytest.approx(math.exp(-0.5))


def test_the_larger_counts_and_fillers_do_not():
    one, two = [0.0, 0.0, 40.0, 32.0], [24.0, 0.0, 64.0, 32.0]
    assert torch.allclose(mask([one, two]), torch.maximum(mask([one]), mask([two])))  # exp may round by the place
    assert torch.allclose(mask([one, two], classes=[1]), mask([two]))
    assert mask([]).sum() == 0 and mask([[8.0, 8.0, 8.0, 8.0]]).isfinite().all()
    batch = KDBatch(input_shape=(32, 64), boxes=[torch.tensor([one, two]), torch.zeros(0, 4)])
    assert GaussianBoxRegion()((torch.zeros(2, 8, 4, 8), ), batch)[0][1].sum() == 0


def test_blocks():
    corners = torch.rand(BLOCK + 9, 2, generator=torch.Generator().manual_seed(0)) * 20
    boxes = torch.cat([corners, corners + 12], dim=1).tolist()
    assert torch.allclose(mask(boxes), torch.stack([mask([box]) for box in boxes]).amax(dim=0))


def test_bad_options():
    with pytest.raises(ValueError, match='spread'):
        GaussianBoxRegion(spread=0)
