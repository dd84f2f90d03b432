"""Deformable attention on a CPU: its samples are read and summed by one operation.

The host makes a map of samples for each level by ``grid_sample``, lays all of them side by side, multiplies by the
weights and sums.  A sample is four cells of a map, each with its bilinear factor; a query of a head is therefore one
sum of 4 L P rows of a table that holds a row for each cell and head, with factors ``w (1 - x) (1 - y)``, ``w x (1 -
y)``, ``w (1 - x) y`` and ``w x y``.  That is what an embedding bag computes, and no sample is kept.  Maps have a border
of zeros in the table, and places outside are moved into it.
"""

import sys
import threading
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from kd_mm.hosts.swap import Swap
from kd_mm.ops.modes import autocast_dtype

#: The host's function, in the namespace of the modules that call it on a CPU.
NAME = 'multi_scale_deformable_attn_pytorch'
#: Queries at a time: what is made for them stays in the cache, and no memory grows with their number.  128 to 8192 take
#: about as long (``python tools/studies/map_layouts.py --only queries``).
QUERIES = 256


def namespaces(model: nn.Module) -> List[ModuleType]:
    """Python modules from which a model takes the host's function."""
    found = {cls.__module__: sys.modules.get(cls.__module__)
             for module in model.modules() for cls in type(module).__mro__}
    return [space for space in found.values() if space is not None and NAME in vars(space)]


class _Grid(NamedTuple):
    """The table's layout for P points in each of L maps, one number for every k = L P."""

    edges: Tensor  # (2, k) width and height
    pitch: Tensor  # (k, ) rows of the table from one cell to that below
    first: Tensor  # (H, k) row of a cell 0, 0
    corners: Tensor  # (4, k) rows from a cell to itself, its right, its lower and its lower right neighbour
    rows: int


def _grid(sizes: Sequence[Tuple[int, int]], heads: int, points: int, dtype: torch.dtype) -> _Grid:
    def each(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32).repeat_interleave(points)

    starts, start = [], 0
    for height, width in sizes:
        starts.append((start + width + 3) * heads)  # past the border above, and the cell of it on the left
        start += (height + 2) * (width + 2)
    pitch, zero = each([(width + 2) * heads for _, width in sizes]), each([0] * len(sizes))
    return _Grid(
        torch.stack([each([width for _, width in sizes]), each([height for height, _ in sizes])]).to(dtype), pitch,
        each(starts) + torch.arange(heads, dtype=torch.int32)[:, None],
        torch.stack([zero, zero + heads, pitch, pitch + heads]),
        # from the border on the right or below, neighbours of no weight lie up to a line and two cells further
        start + max(width for _, width in sizes) + 4)


def _table(value: Tensor, sizes: Sequence[Tuple[int, int]], rows: int) -> Tensor:
    """(N, rows, H, D): the maps of (N, S, H, D), each with a border of one zero."""
    images, _, heads, width = value.shape
    table, first, read = value.new_zeros(images, rows, heads, width), 0, 0
    for high, wide in sizes:
        last = first + (high + 2) * (wide + 2)
        inside = table[:, first:last].view(images, high + 2, wide + 2, heads, width)[:, 1:-1, 1:-1]
        inside.copy_(value[:, read:read + high * wide].reshape(images, high, wide, heads, width))
        first, read = last, read + high * wide
    return table


def sampled(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """What deformable attention gives: (N, Q, H D), the weighted sums of bilinear samples, zero outside of the maps.

    Args:
        value: (N, S, H, D), the cells of all maps, one map after the other; all numbers are finite.
        shapes: (L, 2), height and width of the maps; their products sum to S.
        locations: (N, Q, H, L, P, 2), x and y, 0 to 1 inside of a map; finite.
        weights: (N, Q, H, L, P).

    Example:
        >>> value = torch.arange(4.0).view(1, 4, 1, 1)
        >>> shapes, middle = torch.tensor([[2, 2]]), torch.full((1, 1, 1, 1, 1, 2), 0.5)
        >>> sampled(value, shapes, middle, torch.ones(1, 1, 1, 1, 1)).item()
        1.5
    """
    images, queries, heads, levels, points = weights.shape
    sizes, count, width = [(int(high), int(wide)) for high, wide in shapes], levels * points, value.shape[-1]
    grid = _grid(sizes, heads, points, value.dtype)
    table = _table(value, sizes, grid.rows)
    locations, weights = locations.reshape(images, queries, heads, count, 2), weights.reshape(
        images, queries, heads, count)
    half = value.new_tensor(-0.5)
    result = value.new_empty(images, queries, heads * width)
    for image in range(images):
        cells = table[image].view(-1, width)
        for start in range(0, queries, QUERIES):
            part = slice(start, start + QUERIES)
            place, given = locations[image, part], weights[image, part]
            x, y = (torch.addcmul(half, place[..., axis], grid.edges[axis]).clamp_(min=-1).minimum(grid.edges[axis])
                    for axis in (0, 1))
            left, top = x.floor(), y.floor()
            x, y = x.sub_(left), y.sub_(top)
            rows = top.to(torch.int32).mul_(grid.pitch).add_(left.to(torch.int32), alpha=heads).add_(grid.first)
            factors = value.new_empty(*given.shape[:2], 4, count)
            low = given * y
            high = given - low
            torch.mul(high, x, out=factors[:, :, 1])
            torch.sub(high, factors[:, :, 1], out=factors[:, :, 0])
            torch.mul(low, x, out=factors[:, :, 3])
            torch.sub(low, factors[:, :, 3], out=factors[:, :, 2])
            sums = embedding_bag((rows.unsqueeze(2) + grid.corners).view(-1, 4 * count), cells, mode='sum',
                                 per_sample_weights=factors.view(-1, 4 * count))
            result[image, part] = sums.view(-1, heads * width)
    return result


def by_bags(original: Any) -> Any:
    """The host's function, by :func:`sampled` where that can.

    On a CPU, without gradients, with places in 32 or 64 bits; what else is in the lower precision of an autocast around
    is computed in that of the places, as the host does it.  What is not finite goes to the host, and so does what is no
    map of the given sizes.

    Args:
        original: its own, for everything else.
    """
    def forward(value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor,
                attention_weights: Tensor) -> Tensor:
        floats, kind = (value, sampling_locations, attention_weights), sampling_locations.dtype
        if (not getattr(_INSIDE, 'depth', 0) or kind not in (torch.float32, torch.float64)
                or any(int(edge) < 1 for shape in value_spatial_shapes for edge in shape)
                or value.shape[1] != sum(int(high) * int(wide) for high, wide in value_spatial_shapes)
                or not all(tensor.device.type == 'cpu' and tensor.numel()
                           and tensor.dtype in (kind, autocast_dtype('cpu')) for tensor in floats)
                or torch.is_grad_enabled() and any(tensor.requires_grad for tensor in floats)
                or not bool(torch.isfinite(sampling_locations.sum() + value.sum()))):
            result: Tensor = original(value, value_spatial_shapes, sampling_locations, attention_weights)
            return result
        return sampled(value.to(kind), value_spatial_shapes, sampling_locations, attention_weights.to(kind))

    return forward


#: How deep this thread is in passes of teachers.
_INSIDE = threading.local()
#: The namespaces with another function than the host's, and for how many passes of how many threads.
_USERS: Dict[str, Tuple[Swap, int]] = {}
_LOCK = threading.Lock()


@contextmanager
def sampling_in(space: ModuleType) -> Iterator[None]:
    """The host's function in a namespace is :func:`by_bags` inside, for this thread.

    A namespace is there once for all threads: the first pass of all exchanges the function, the last one puts it back.
    """
    with _LOCK:
        swap, users = _USERS.get(space.__name__, (Swap(space, NAME, by_bags(vars(space)[NAME])), 0))
        _USERS[space.__name__] = swap.on(), users + 1
    _INSIDE.depth = getattr(_INSIDE, 'depth', 0) + 1
    try:
        yield
    finally:
        _INSIDE.depth -= 1
        with _LOCK:
            swap, users = _USERS.pop(space.__name__)
            if users > 1:
                _USERS[space.__name__] = swap, users - 1
            else:
                swap.off()
