"""The student's own loss while it learns from a teacher: on some of its classes alone, or left out.

A detector that learns new classes has the old ones unlabelled in its pictures, and its own loss takes them for
background: it unlearns the scores that it should keep.  So its loss gets the logits of the old classes without
gradient.
"""

from typing import Any, Dict, List, Optional, Sequence

import torch
from torch import Tensor, nn

from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.growing import Names
from kd_mm.hosts.meaning import CLASSES
from kd_mm.hosts.models import task_of
from kd_mm.hosts.places import class_branches, head_meaning
from kd_mm.hosts.rows import in_trunk
from kd_mm.hosts.swap import Swap
from kd_mm.ops.classes import common_classes

#: Where the head is, and its method that gets the class logits first.
HEAD, METHOD = 'bbox_head', 'loss_by_feat'
#: Which classes the student's own loss teaches: all of them, or those that its teacher does not know.
ALL, NEW = 'all', 'new'


def left_out(student: nn.Module, which: str, names: Names) -> List[int]:
    """Indices of the classes that the own loss does not teach.

    Args:
        student: the model.
        which: ``'all'`` or ``'new'``.
        names: of the classes of the student and of the teacher.

    Raises:
        ValueError: ``which`` is none of them, or it cannot be done with this model or without names.

    Example:
        >>> left_out(nn.Linear(1, 1), 'all', (None, None))
        []
    """
    if which == ALL:
        return []
    if which != NEW:
        raise ValueError(f'task_classes={which!r} must be {ALL!r} or {NEW!r}')
    fault = why_not(student)
    if fault is not None:
        raise ValueError(f'task_classes={NEW!r} needs a one-stage detector with sigmoid scores: {fault}. For a '
                         'segmenter MiBCELoss takes the place of its own loss')
    if names[0] is None or names[1] is None:
        raise ValueError(f'task_classes={NEW!r} needs the class names of both models; those of the '
                         f'{"student" if names[0] is None else "teacher"} are not known')
    found = common_classes(names[0], names[1])[0]
    if len(found) == len(names[0]):
        raise ValueError(f'task_classes={NEW!r}: the teacher knows all classes of the student, and none is left for '
                         'its own loss. Leave it out')
    return found


def why_not(student: nn.Module) -> Optional[str]:
    """Why the loss of a model cannot be kept to some classes; None where it can.

    Example:
        >>> why_not(nn.Linear(1, 1))
        "Linear has no dense head 'bbox_head' with a score for each class by itself (sigmoid)"
    """
    head: Any = getattr(student, HEAD, None)
    meaning = head_meaning(student, HEAD) if isinstance(head, nn.Module) else None
    if (meaning is None or meaning.kind != CLASSES or not meaning.sigmoid or meaning.background
            or not class_branches(head) or not callable(getattr(head, METHOD, None))):
        return (f'{type(student).__name__} has no dense head {HEAD!r} with a score for each class by itself (sigmoid)')
    return None


def kept_from(student: nn.Module, classes: Sequence[int]) -> Swap:
    """An exchange of the method that makes the head's losses: for it, some classes' logits have no gradient.

    The losses have the same values as without.  What else reads the logits has their gradient.

    Args:
        student: for which :func:`why_not` gives None.
        classes: their indices.
    """
    head: Any = getattr(student, HEAD)
    method = getattr(head, METHOD)
    keeps = torch.ones(head.num_classes, dtype=torch.bool)
    keeps[list(classes)] = False

    def loss(logits: List[Tensor], *args: Any, **kwargs: Any) -> Any:
        kept = []
        for level in logits:  # (N, anchors * K, H, W), the class varying fastest
            mask = keeps.to(level.device).repeat(level.shape[1] // len(keeps))[:, None, None]
            kept.append(torch.where(mask, level, level.detach()))
        return method(kept, *args, **kwargs)

    return Swap(head, METHOD, loss)


def skipped(student: Any, paths: Sequence[str]) -> Swap:
    """An exchange of the student's loss for its forward pass alone: the loss has the weight 0 and may lack its labels.

    Args:
        student: the model.
        paths: the taps that are looked at.
    """
    trunk = task_of(student) is not None and all(in_trunk(path) for path in paths)

    def loss(inputs: Tensor, data_samples: Any, *args: Any, **kwargs: Any) -> Dict[str, Tensor]:
        if trunk:  # nobody looks at the heads
            student.extract_feat(inputs)
        else:
            forward_tensor(student, inputs, data_samples, paths)
        return {}

    return Swap(student, 'loss', loss)
