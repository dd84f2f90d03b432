"""What a tap recorded."""

from typing import Any, Dict, NamedTuple, Tuple

from torch import Tensor


class Call(NamedTuple):
    """One recorded call: its arguments and its result with the structure that the module gave it."""

    args: Tuple[Any, ...]
    kwargs: Any
    output: Any


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
    """

    calls: Tuple[Call, ...] = ()
    owner: Any = None
    memo: Dict[Any, Any]
    edges: Tuple[Any, ...] = ()
    given: Tuple[Any, ...] = ()
