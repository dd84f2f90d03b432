import pytest
import torch

from kd_mm.losses.base.instances import instance_rows, pool_instances, rows_of_level
from kd_mm.types.batch import KDBatch


def test_pooling_by_hand():
    # The value of a cell is its column; the box covers columns 1 and 2 of the second image.
    features = torch.arange(4.0).expand(2, 1, 4, 4).double().contiguous()
    features = torch.cat([features[:1] * 0, features[1:]])
    rows = torch.tensor([[1.0, 8.0, 8.0, 24.0, 24.0]]).double()
    assert pool_instances(features, rows, (32, 32), 2)[0, 0].tolist() == [[1.0, 2.0], [1.0, 2.0]]
    # A map that is not as wide for its height as the frame: columns are 16 pixels, rows 8.
    rows = torch.tensor([[1.0, 16.0, 8.0, 48.0, 24.0]]).double()
    assert pool_instances(features, rows, (32, 64), 2)[0, 0].tolist() == [[1.0, 2.0], [1.0, 2.0]]


def test_no_instance_is_empty_and_connected():
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    pooled = pool_instances(features, torch.zeros(0, 5), (32, 32), 2)
    assert pooled.shape == (0, 3, 2, 2)
    pooled.sum().backward()
    assert features.grad.abs().sum() == 0


def test_given_instances_take_the_place_of_the_boxes():
    boxes = [torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.zeros(0, 4)]
    like = torch.zeros(2, 3, 4, 4).double()
    rows = instance_rows(KDBatch(boxes=boxes), like)
    assert rows.tolist() == [[0, 0, 0, 8, 8]] and rows.dtype == torch.float64
    other = [torch.zeros(0, 4), torch.tensor([[4.0, 4.0, 9.0, 9.0]])]
    assert instance_rows(KDBatch(boxes=boxes, instances=other), like).tolist() == [[1, 4, 4, 9, 9]]
    with pytest.raises(ValueError, match='boxes of 1 images for features of 2'):
        instance_rows(KDBatch(boxes=boxes[:1]), like)


def test_every_row_has_one_level():
    edges = torch.tensor([10.0, 112.0, 223.0, 224.0, 4000.0])
    rows = torch.stack([edges * 0, edges * 0, edges * 0, edges, edges], dim=1)
    assert [len(rows_of_level(rows, level, 3, 56.0)) for level in range(3)] == [1, 2, 2]
