"""The adapter that a loss gets when its config names none."""

from typing import List, Optional

from torch import nn

from kd_mm.adapters.base import Adapter
from kd_mm.adapters.conv import ConvAdapter
from kd_mm.adapters.resize import ResizeAdapter
from kd_mm.adapters.sequential import SequentialAdapter
from kd_mm.types.batch import Features


def auto_adapter(loss: nn.Module, student: Features, teacher: Features) -> Optional[Adapter]:
    """The smallest adapter that makes ``student`` comparable with ``teacher`` for ``loss``; None when none is needed.

    Different channels get a 1x1 convolution on the student, unless the loss compares class logits, which no
    convolution may mix; different sizes a bilinear resize of the student to the teacher.

    Args:
        loss: its attributes ``logits``, ``same_channels`` and ``same_size`` say what it needs.
        student: L tensors.
        teacher: L tensors.

    Returns:
        An adapter that is not prepared yet, or None.  Shapes that no adapter can mend are left to
        ``loss.check_shapes``.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='CWDLoss'))
        >>> type(auto_adapter(loss, (torch.zeros(1, 4, 8, 8), ), (torch.zeros(1, 6, 8, 8), ))).__name__
        'ConvAdapter'
    """
    if len(student) != len(teacher) or any(tensor.dim() != 4 for tensor in (*student, *teacher)):
        return None
    pairs = list(zip(student, teacher))
    adapters: List[Adapter] = []
    if loss.same_channels and not loss.logits and any(s.shape[1] != t.shape[1] for s, t in pairs):
        adapters.append(ConvAdapter())
    if loss.same_size and any(s.shape[2:] != t.shape[2:] for s, t in pairs):
        adapters.append(ResizeAdapter())
    if len(adapters) > 1:
        return SequentialAdapter(adapters)
    return adapters[0] if adapters else None
