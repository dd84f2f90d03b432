"""What a tap recorded."""

from typing import Any, Dict, NamedTuple, Optional, Tuple

from torch import Tensor


class Call(NamedTuple):
    """One recorded call: its arguments and its result with the structure that the module gave it."""

    args: Tuple[Any, ...]
    kwargs: Any
    output: Any


class Seen(NamedTuple):
    """How a teacher saw a batch that had another size for the student, in pixels.

    Attributes:
        size: (H, W) of the pictures that it was given.
        content: (h, w) of their upper left part that shows the student's batch; the rest is padding.
        shape: (Hin, Win) of the student's batch.
        strides: whether a map as large as one of the student's has its stride: not where every batch is brought to one
            size, or scaled by something else than a power of two, where small maps are equal by chance.
    """

    size: Tuple[int, int]
    content: Tuple[int, int]
    shape: Tuple[int, int]
    strides: bool = True

    @property
    def part(self) -> Tuple[float, float]:
        """Share of height and width that is no padding."""
        return self.content[0] / self.size[0], self.content[1] / self.size[1]

    @property
    def factors(self) -> Tuple[float, float]:
        """Pixels of the teacher for one of the student, in height and width."""
        return self.content[0] / self.shape[0], self.content[1] / self.shape[1]


class Recorded(Tuple[Tensor, ...]):
    """The tensors that a tap has recorded, and the calls they came from where the tap keeps structure.

    Attributes:
        calls: the calls, in order; empty for a tap without structure.
        owner: the instance whose method was tapped.
        memo: what several losses have made of this record in this step, so that it is made once.
        edges: where the recorded tensors come from in the graph: with respect to these the gradient is the whole one,
            also that of what the host makes of them (the recorded tensors may be copies that only we use). Empty where
            nothing has a gradient.
        given: the same of the arguments of its calls, where the tap keeps structure.
        seen: how its model saw the batch; None for one that sees it as the student does.
    """

    calls: Tuple[Call, ...] = ()
    owner: Any = None
    memo: Dict[Any, Any]
    edges: Tuple[Any, ...] = ()
    given: Tuple[Any, ...] = ()
    seen: Optional[Seen] = None
