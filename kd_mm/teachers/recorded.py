"""What taps have recorded: how far two records are apart, in the host's form, put back."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
from torch import Tensor

from kd_mm.hosts.taps import Tap, tensors_in
from kd_mm.types.records import Call, Recorded


def distance(found: Recorded, exact: Recorded) -> float:
    """The largest difference between two records of one tap, of each tensor relative to its largest value; infinite
    where they do not compare.

    A tensor counts as at least a hundredth of the largest of the tap: a norm over one value (a map of one cell) gives
    0, and by rounding not quite.
    """
    own, theirs = _all_tensors(found), _all_tensors(exact)
    if [tensor.shape for tensor in own] != [tensor.shape for tensor in theirs]:
        return float('inf')
    gaps, sizes = [], []
    for one, other in zip(own, theirs):
        finite = torch.isfinite(other)
        if not torch.equal(torch.isfinite(one), finite):
            return float('inf')
        if one.numel():
            one, other = torch.where(finite, one, 0).double(), torch.where(finite, other, 0).double()
            gaps.append(float((one - other).abs().max()))
            sizes.append(float(other.abs().max()))
    floor = 0.01 * max(sizes, default=0.0)
    return max((gap / max(size, floor) if max(size, floor) else float('inf')
                for gap, size in zip(gaps, sizes) if gap), default=0.0)


def _all_tensors(record: Recorded) -> List[Tensor]:
    return [*record, *(tensor for call in record.calls for tensor in tensors_in(call.output))]


def as_host(record: Recorded, dtype: Optional[torch.dtype]) -> Recorded:
    """A record in the host's layout (and in ``dtype``): losses and second passes get what they would have got."""
    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            return value.contiguous() if value.dim() == 4 and value.is_contiguous(
                memory_format=torch.channels_last) else value
        if type(value) in (tuple, list):
            return type(value)(convert(item) for item in value)
        if type(value) is dict:
            return {key: convert(item) for key, item in value.items()}
        return value

    result = Recorded(convert(tensor) for tensor in record)
    result.owner, result.memo = record.owner, {}
    result.calls = tuple(Call(convert(call.args), convert(call.kwargs), convert(call.output)) for call in record.calls)
    return result


@contextmanager
def put_back(taps: Sequence[Tap]) -> Iterator[Dict[str, Recorded]]:
    """What taps have recorded, by path; they have it again afterwards, whatever they record inside."""
    records = {tap.path: tap.read() for tap in taps}
    try:
        yield records
    finally:
        for tap in taps:
            tap.clear()
            tap.put(records[tap.path])
