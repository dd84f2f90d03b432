"""Regions along the borders between the classes of a segmentation map."""

from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.ops.checks import one_of, whole
from kd_mm.ops.functional import parameter_options
from kd_mm.regions.base import RegionMask
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import seg_map

MODES = ('edge', 'body')

#: most numbers of the label maps, one a class, that are held at once.
BLOCK = 2**20


def odd_width(owner: str, width: int) -> int:
    """``width`` if it is an odd whole number from 3.

    Raises:
        ValueError: it is not.

    Example:
        >>> odd_width('EdgeRegion', 7)
        7
    """
    found = whole(owner, 'width', width, 3)
    if found % 2 == 0:
        raise ValueError(f'{owner}: width={width!r} must be an odd whole number from 3')
    return found


def label_edges(labels: Tensor, width: int, ignore_index: int) -> Tuple[Tensor, Tensor]:
    """Pixels whose window holds more than one label, and those that have a label.

    Args:
        labels: (N, H, W); ignored pixels make no edge and are at none.
        width: edge of the window in pixels, odd.
        ignore_index: their label.

    Returns:
        Two (N, 1, H, W), bool.

    Example:
        >>> edges, known = label_edges(torch.tensor([[[0, 0, 0, 1, 255]]]), 3, 255)
        >>> edges.int().flatten(), known.int().flatten()
        (tensor([0, 0, 1, 1, 0], dtype=torch.int32), tensor([1, 1, 1, 1, 0], dtype=torch.int32))
    """
    known = (labels != ignore_index)[:, None]
    # Labels up to 2**24 are exact in float32, the only type that max_pool2d takes on every device.
    values = labels[:, None].float()
    highest = window_maximum(values.masked_fill(~known, -1e9), width)
    lowest = -window_maximum((-values).masked_fill(~known, -1e9), width)
    return (highest != lowest) & known, known


def window_maximum(values: Tensor, width: int) -> Tensor:
    """Largest of the window around each pixel, along one axis after the other.

    Example:
        >>> window_maximum(torch.tensor([[[[3., 0., 0., 1.]]]]), 3).flatten()
        tensor([3., 3., 1., 1.])
    """
    values = F.max_pool2d(values, (1, width), 1, (0, width // 2))
    return F.max_pool2d(values, (width, 1), 1, (width // 2, 0))


def window_classes(labels: Tensor, mixed: Tensor, classes: int, width: int) -> Tensor:
    """Which classes the window of each edge pixel holds, one bit a class.

    The edge of class k is the dilation less the erosion of its pixels: where the window holds k and something else.
    Bits make the dilation of eight classes one operation on bytes.

    Args:
        labels: (N, H, W).
        mixed: (N, 1, H, W), the edges of :func:`label_edges`.
        classes: K.
        width: edge of the window in pixels, odd.

    Returns:
        (N, ceil(K / 8), H, W), uint8; class k is bit ``k % 8`` of word ``k // 8``. Zero where there is no edge.

    Example:
        >>> labels = torch.tensor([[[0, 0, 1, 1]]])
        >>> window_classes(labels, label_edges(labels, 3, 255)[0], 2, 3).flatten()
        tensor([0, 3, 3, 0], dtype=torch.uint8)
    """
    word = torch.arange(-(-classes // 8), device=labels.device).view(1, -1, 1, 1)
    labels = labels[:, None]
    sets = torch.where(labels // 8 == word, (torch.ones_like(labels) << labels % 8), 0).to(torch.uint8)
    for axis, padding in ((3, (width // 2, width // 2, 0, 0)), (2, (0, 0, width // 2, width // 2))):
        sets, covered = F.pad(sets, padding), 1
        while covered < width:  # each turn doubles what a pixel has seen
            step = min(covered, width - covered)
            left = sets.shape[axis] - step
            sets = sets.narrow(axis, 0, left) | sets.narrow(axis, step, left)
            covered += step
    return sets * mixed


def class_edges(sets: Tensor, classes: Tensor, size: Tuple[int, int]) -> Tensor:
    """Share of each cell that lies at the edge of each class.

    Args:
        sets: of :func:`window_classes`.
        classes: (K,), which classes.
        size: (h, w) of the result.

    Returns:
        (N, K, h, w) within 0..1.

    Example:
        >>> labels = torch.tensor([[[0, 0, 1, 1]]])
        >>> sets = window_classes(labels, label_edges(labels, 3, 255)[0], 2, 3)
        >>> class_edges(sets, torch.tensor([1]), (1, 2)).flatten()
        tensor([0.5000, 0.5000])
    """
    edges = torch.empty(sets.shape[0], len(classes), *size, device=sets.device)
    word, bit = classes // 8, (torch.ones_like(classes) << classes % 8).to(torch.uint8)
    chunk = max(BLOCK // max(sets[:, 0].numel(), 1), 1)
    for start in range(0, len(classes), chunk):
        part = slice(start, start + chunk)
        own = sets[:, word[part]] & bit[part].view(1, -1, 1, 1)
        edges[:, part] = F.adaptive_avg_pool2d((own > 0).float(), size)
    return edges


@MODELS.register_module()
class EdgeRegion(RegionMask):
    """Cells along the borders between classes, or the rest of the labelled cells.

    A cell's weight is the share of its pixels at a border (``mode='edge'``) or labelled and at none (``mode='body'``);
    the borders are found in the label map itself, before it is made smaller.

    Args:
        mode: 'edge' (default) or 'body'.
        width: edge of the window in pixels of the label map, odd, at least 3: a pixel is at a border if the window
            around it holds more than one class. Default 7.

    Returns:
        L tensors (N, 1, H, W) within 0..1.

    Raises:
        ValueError: an option has a bad value, or the data has no segmentation map.

    Example:
        >>> batch = KDBatch(seg_map=torch.tensor([[[0, 0, 0, 0, 0, 0, 1, 1]]]))
        >>> EdgeRegion(width=3)((torch.zeros(1, 8, 1, 4), ), batch)[0].flatten()
        tensor([0.0000, 0.0000, 0.5000, 0.5000])
    """

    needs_seg_map = True

    def __init__(self, mode: str = 'edge', width: int = 7):
        super().__init__()
        self.mode = one_of('EdgeRegion', 'mode', mode, MODES)
        self.width = odd_width('EdgeRegion', width)

    def forward(self, features: Features, batch: KDBatch) -> Features:
        mixed, known = label_edges(seg_map(batch).to(features[0].device), self.width, batch.targets.ignore_index)
        chosen = (mixed if self.mode == 'edge' else known & ~mixed).float()
        return tuple(F.adaptive_avg_pool2d(chosen, (tensor.shape[2], tensor.shape[3])).to(**parameter_options(tensor))
                     for tensor in features)
