"""A batch in parts: the teacher sees some of the images at a time, and needs the memory of these alone.

In eval mode an image does not depend on the others of its batch, so the parts joined are the whole, up to the last bits
of a convolution, whose algorithm may depend on the batch size.  Where each tensor is to be joined is found in the dry
pass, from the whole and its parts: not every output has the images in front, and some have none.
"""

from typing import Any, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from kd_mm.ops.live import walk
from kd_mm.types.records import Call, Recorded

#: Dimension along which a tensor is joined; None for one that is the same in every part.
Dimension = Optional[int]


def slices(count: int, size: int) -> List[slice]:
    """Parts of ``count`` images, ``size`` each but the last.

    Example:
        >>> slices(5, 2)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def part_of(samples: Any, part: slice) -> Any:
    """The data samples of some images; what is no sequence of one an image stays as it is."""
    return samples[part] if isinstance(samples, (list, tuple)) else samples


def plan(whole: Recorded, parts: Sequence[Recorded]) -> Tuple[Dimension, ...]:
    """Along which dimension each tensor of a record is joined, in the order of :func:`kd_mm.ops.live.walk`.

    Args:
        whole: of a batch.
        parts: of the images of the batch, one by one.

    Raises:
        ValueError: they do not fit together.
    """
    rows = [list(walk(_content(record))) for record in (whole, *parts)]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f'it gives {len(rows[0])} tensors for the whole batch and {len(rows[1])} for one image')
    return tuple(_dimension(row[0], row[1:]) for row in zip(*rows))


def _dimension(whole: Tensor, parts: Sequence[Tensor]) -> Dimension:
    shape = tuple(whole.shape)
    if all(part.shape == whole.shape for part in parts):
        if all(torch.equal(part, parts[0]) for part in parts):
            return None
        raise ValueError(f'an output of {shape} has the same shape for every number of images, and other values')
    for dim in range(whole.dim()):
        if whole.shape[dim] == sum(part.shape[dim] if part.dim() == whole.dim() else -1 for part in parts) and all(
                part.shape[:dim] + part.shape[dim + 1:] == whole.shape[:dim] + whole.shape[dim + 1:]
                for part in parts):
            return dim
    raise ValueError(f'an output of {shape} for the whole batch is {[tuple(part.shape) for part in parts]} for its '
                     'images')


def join(parts: Sequence[Recorded], dimensions: Sequence[Dimension]) -> Recorded:
    """One record from those of several parts of a batch."""
    if len(parts) == 1:
        return parts[0]
    along = iter(dimensions)
    tensors, calls = _join([_content(part) for part in parts], along)
    result = Recorded(tensors)
    result.calls, result.owner, result.memo = tuple(Call(*call) for call in calls), parts[0].owner, {}
    return result


def tensors_of(record: Recorded) -> Iterator[Tensor]:
    """Every tensor of a record, those of its calls too."""
    return walk(_content(record))


def _content(record: Recorded) -> Tuple[Any, ...]:
    return tuple(record), tuple(tuple(call) for call in record.calls)


def _join(values: Sequence[Any], along: Iterator[Dimension]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        dim = next(along)
        return first if dim is None else torch.cat(list(values), dim)
    if isinstance(first, tuple):
        return tuple(_join(items, along) for items in zip(*values))
    if isinstance(first, list):
        return [_join(items, along) for items in zip(*values)]
    if isinstance(first, dict):
        return {key: _join([value[key] for value in values], along) for key in first}
    return first
