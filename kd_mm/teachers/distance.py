"""How far two records of one tap are apart."""

from typing import List

import torch
from torch import Tensor

from kd_mm.hosts.taps import tensors_in
from kd_mm.types.records import Recorded


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
