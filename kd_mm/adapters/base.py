"""Adapters bring student and teacher features into one space; they exist during training only."""

from typing import Optional, Tuple

from torch import Tensor, nn

from kd_mm.ops.problems import named
from kd_mm.types.batch import Features

#: What is said of an adapter that fails: it may be a class of the user's.
CONTRACT = ('Its prepare(student, teacher) and forward(student, teacher) are given two tuples of tensors, one tensor a '
            'level; forward returns two such tuples')


class Adapter(nn.Module):
    """Maps a pair of feature tuples to a pair that a loss can compare.

    Both sides are passed because some recipes normalise both (RTMDet's); most adapters change the student alone.
    Adapters compute in float32 under mixed precision, like the losses.
    """

    def prepare(self, student: Features, teacher: Features) -> None:
        """Create the parameters, sized by one pair of features, before the optimizer is given them.

        It may be called again, and then must change nothing.
        """

    def forward(self, student: Features, teacher: Features) -> Tuple[Features, Features]:
        """Both sides as the loss compares them.

        Args:
            student: L tensors, one a level.
            teacher: L tensors.
        """
        raise NotImplementedError


def prepared(adapter: Adapter, student: Features, teacher: Features) -> None:
    """Let an adapter make its parameters.

    Raises:
        ValueError: it fails.
    """
    with named(type(adapter).__name__, CONTRACT):
        adapter.prepare(student, teacher)


def adapted(adapter: Adapter, student: Features, teacher: Features) -> Tuple[Features, Features]:
    """What an adapter makes of both sides, looked at.

    Raises:
        ValueError: it fails, or gives something else than two tuples of tensors.
    """
    name = type(adapter).__name__
    with named(name, CONTRACT):
        pair = adapter(student, teacher)
    fine = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(
        isinstance(side, (list, tuple)) and side and all(isinstance(level, Tensor) for level in side) for side in pair)
    if not fine:
        got = [type(side).__name__ for side in pair] if isinstance(pair, (list, tuple)) else type(pair).__name__
        raise ValueError(f'{name} returned {got}. {CONTRACT}')
    return tuple(pair[0]), tuple(pair[1])


def check_maps(name: str, student: Features, teacher: Features, prepared: Optional[int] = None) -> None:
    """Raise a ValueError unless both sides have the same number of levels, all of them maps (N, C, H, W).

    Args:
        name: class name for the message.
        student: L tensors.
        teacher: L tensors.
        prepared: the number of levels that the adapter was prepared for.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(f'{name}: {len(student)} student levels and {len(teacher)} teacher levels. Choose the same '
                         'number with `levels`, or taps with the same number of outputs')
    for level, (s, t) in enumerate(zip(student, teacher)):
        if s.dim() != 4 or t.dim() != 4:
            raise ValueError(f'{name}, level {level}: student {tuple(s.shape)} and teacher {tuple(t.shape)} are not '
                             'both maps (N, C, H, W). Tap a module with map outputs, or remove `adapter`')
    if prepared is not None and prepared != len(student):
        raise ValueError(f'{name} was prepared for {prepared} levels and got {len(student)}')
