"""Weights of convolutions as the processor's library wants them, kept from pass to pass.

The library (oneDNN) lays the weights of a convolution out in blocks before it uses them, in every pass; before that
those of a folded pair are multiplied.  Both take as long for few cells as for many: 3 to 11 % of a convolution's time
at 4096 cells, 13 to 25 % at 512 (``python tools/studies/map_layouts.py --only packed``).  Of a teacher whose weights
stay as they are the result is kept where the map is small: the same numbers, bit for bit, for a second copy of them.
"""

from typing import Any, Callable, Dict, NamedTuple, Sequence

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from kd_mm.ops.live import counted
from kd_mm.ops.modes import autocast_dtype
from kd_mm.teachers.maps import wide

#: Up to how many cells (N Hout Wout) of an output the weights are kept: with more it gives less than 4 %.
CELLS = 4096


class _Kept(NamedTuple):
    """The packed weights of a layer, and what they were made of."""

    state: Any
    packed: Tensor
    held: Sequence[Tensor]
    source: Callable[[], Sequence[Tensor]]
    make: Callable[[], Tensor]
    views: Sequence[Tensor]
    samples: Sequence[Tensor]


def cells_of(layer: nn.Conv2d, images: Tensor) -> int:
    """About how many cells N Hout Wout a convolution's output has, for images (N, C, Hin, Win).

    Example:
        >>> cells_of(nn.Conv2d(1, 1, 3, stride=2, padding=1), torch.zeros(2, 1, 8, 8))
        32
    """
    return images.shape[0] * images.shape[-2] * images.shape[-1] // (layer.stride[0] * layer.stride[1])


def _state(kind: torch.dtype, source: Sequence[Tensor]) -> Any:
    return (kind, *map(counted, source))


def _views(weight: Tensor) -> Sequence[Tensor]:
    """One number of each output channel and one of each input channel, where they are."""
    middle = weight.detach()[:, :, weight.shape[2] // 2, weight.shape[3] // 2]
    return middle[:, 0], middle[0]


class WeightsChanged(Exception):  # noqa: N818  (a signal: the pass is done again)
    """Something past torch's count has changed weights in the middle of a pass that has used what was kept."""


class Packing:
    """Packed weights of a teacher.

    What torch counts as a change of a weight is seen at once, as is one past that count (``.data``) that changes one of
    the numbers that are compared in every pass: one of each output and one of each input channel, of every layer. Other
    changes of that kind are found by a look at one layer in each pass, in turn.  After a change of that kind nothing is
    kept any more.

    Args:
        fixed: whether the teacher's weights stay as they are; if not, nothing is kept.
    """

    def __init__(self, fixed: bool):
        self.fixed = fixed and hasattr(torch.ops.mkldnn, '_reorder_convolution_weight')
        #: whether weights are kept in this pass.
        self.on = False
        self._kept: Dict[nn.Module, _Kept] = {}
        self._turn = 0

    def takes(self, layer: nn.Module, cells: int) -> bool:
        """Whether the weights of a layer are kept where its output has so many cells."""
        return self.on and self.fixed and isinstance(layer, nn.Conv2d) and cells <= CELLS

    def weight(self, layer: nn.Conv2d, images: Tensor, kind: torch.dtype, source: Callable[[], Sequence[Tensor]],
               make: Callable[[], Tensor]) -> Tensor:
        """``make()``, or what was packed of it.

        Args:
            layer: whose weights they are.
            images: (N, C, Hin, Win), what it is applied to.
            kind: dtype that the library computes in.
            source: gives the tensors that ``make`` uses, the layer's own weights first.
            make: gives the weights.

        Raises:
            WeightsChanged: what is kept is of other weights; from now on nothing is.
        """
        if not self.takes(layer, cells_of(layer, images)) or wide(layer, images):
            return make()
        tensors = source()
        if any(part.is_inference() for part in tensors):  # of these torch counts no change
            return make()
        state, kept = _state(kind, tensors), self._kept.get(layer)
        if kept is None or kept.state != state:
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                make().to(kind), layer.padding, layer.stride, layer.dilation, layer.groups, list(images.shape))
            # tensor and memory are held: neither becomes another's, which would have the same state
            held = [item for part in tensors for item in (part, part.detach())]
            views = _views(tensors[0])
            kept = self._kept[layer] = _Kept(
                state, packed, held, source, make, views, [view.clone() for view in views])
        elif not all(map(torch.equal, kept.views, kept.samples)):
            self.drop()
            raise WeightsChanged
        return kept.packed

    def look(self) -> None:
        """Look whether what is kept of one layer is what it would be now; what no one can use is let go."""
        if not self._kept:
            return
        self._turn = (self._turn + 1) % len(self._kept)
        layer, kept = list(self._kept.items())[self._turn]
        kind = autocast_dtype('cpu') or torch.float32  # of this pass
        if _state(kind, kept.source()) != kept.state:
            del self._kept[layer]
        elif not torch.equal(kept.packed.to_dense(), kept.make().to(kind)):
            self.drop()

    def drop(self, told: bool = False) -> None:
        """Keep nothing any more; ``told``: whether the log has it already."""
        if self._kept and not told:
            print_log('kd_mm: weights of the teacher were changed through `.data`, which torch does not count; from '
                      'now on they are read anew in every pass', 'current', level=30)
        self.fixed = False
        self._kept.clear()

    def __getstate__(self) -> Dict[str, Any]:
        """For copies, which pack anew: what is packed has no memory of its own that torch could copy."""
        return {**vars(self), '_kept': {}}
