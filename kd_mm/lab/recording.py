"""What the taps gave in one step, to compute terms on it repeatedly."""

import dataclasses
from typing import Any, Dict

from torch import Tensor

from kd_mm.types.batch import KDBatch
from kd_mm.types.records import Call, Recorded


@dataclasses.dataclass
class Recording:
    """What the taps of all terms gave in one step, cut off from both models: terms can be computed on it repeatedly.

    Attributes:
        records: name of a model -> path -> record; what had a history is a leaf that asks for a gradient.
        batch: of that step.
    """

    records: Dict[str, Dict[str, Recorded]]
    batch: KDBatch

    def fresh(self, number: int) -> 'Recording':
        """The same features without gradients and without what a loss has noted; ``number`` steps later."""
        leaves: Dict[int, Tensor] = {}
        # Another step, so that what happens once a step (writing to a bank, drawing a mask) happens.
        info = dataclasses.replace(self.batch.info, step=self.batch.info.step + number)
        return Recording(_cut(self.records, leaves), KDBatch(self.batch.targets, info, self.batch.given))


def _cut(value: Any, leaves: Dict[int, Tensor]) -> Any:
    """``value`` with a leaf of the same memory in place of every tensor that asks for a gradient."""
    if isinstance(value, Tensor):
        if not value.requires_grad:
            return value
        if id(value) not in leaves:
            leaves[id(value)] = value.detach().requires_grad_()
        return leaves[id(value)]
    if isinstance(value, Recorded):
        record = Recorded(_cut(tensor, leaves) for tensor in value)
        record.calls, record.owner, record.memo = tuple(_cut(call, leaves) for call in value.calls), value.owner, {}
        record.seen = value.seen
        return record
    if isinstance(value, Call):
        return Call(*(_cut(part, leaves) for part in value))
    if type(value) in (tuple, list):
        return type(value)(_cut(item, leaves) for item in value)
    if type(value) is dict:
        return {key: _cut(item, leaves) for key, item in value.items()}
    return value
