"""Adapters bring student and teacher features into one space; they exist during training only."""

from typing import Optional, Tuple

from torch import nn

from kd_mm.types.batch import Features


class Adapter(nn.Module):
    """Maps a pair of feature tuples to a pair that a loss can compare.

    Both sides are passed because some recipes normalise both (RTMDet's); most adapters change the student alone.
    Adapters compute in float32 under mixed precision, like the losses.
    """

    def prepare(self, student: Features, teacher: Features) -> None:
        """Create the parameters, sized by one pair of features, before the optimizer is given them.

        In plain-tensor use the first call does it.  A second call changes nothing.
        """

    def forward(self, student: Features, teacher: Features) -> Tuple[Features, Features]:
        raise NotImplementedError


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
