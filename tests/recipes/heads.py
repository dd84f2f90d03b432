"""What the recipes of losses on heads share: views from the arrays of a file, and the comparison of their terms."""

from typing import Any, Dict, List, Optional, Sequence

import torch
from torch import Tensor

from kd_mm.losses.base.head import HeadLoss
from kd_mm.registry import build
from kd_mm.types.dense import Assignment, DenseView, Rows, rows
from recipes.vector import Vector

#: mmdet adds it to every divisor.
EPS = torch.finfo(torch.float32).eps


def class_rows(maps: Sequence[Tensor], classes: int) -> Rows:
    """Class maps (N, A*K, H, W) as rows."""
    return rows(maps, classes)


def distribution_rows(maps: Sequence[Tensor], bins: int) -> Rows:
    """Maps (N, 4*B, H, W) as rows (N, P, 4, B)."""
    return tuple(level.unflatten(-1, (4, bins)) for level in rows(maps, 4 * bins))


def assignment(weights: Sequence[Tensor], classes: int, labels: Optional[Sequence[Tensor]] = None,
               num_pos: float = 1.0) -> Assignment:
    """An assignment with the label weights of a file, and its labels where it has some."""
    labels = [torch.full(level.shape, classes) for level in weights] if labels is None else labels
    return Assignment(tuple(labels), tuple(weights), classes, None, torch.tensor(num_pos, dtype=torch.float64))


def compare(v: Vector, cfg: Dict[str, Any], student: DenseView, teacher: DenseView, inputs: Sequence[Tensor],
            names: Dict[str, str], batch: Any = None, prefix: str = '') -> Tensor:
    """Run a head loss and compare the loss, its terms by level and the gradients of ``inputs``.

    Args:
        names: term -> name of its numbers in the file, with ``{}`` for the level.
    """
    loss = build(cfg)
    assert isinstance(loss, HeadLoss)
    total = loss(student, teacher, batch)
    v.check(f'{prefix}loss', total)
    weight = loss.weight.at(0, 0, len(student))[0]
    parts: Dict[str, List[Tensor]] = loss.terms(student, teacher.detach(), batch)
    for term, name in names.items():
        for level, value in enumerate(parts[term]):
            v.check(prefix + name.format(level), value * loss.factors.get(term, 1.0) * weight)
    found = torch.autograd.grad(total, list(inputs), allow_unused=True, retain_graph=True)
    for index, (tensor, grad) in enumerate(zip(inputs, found)):
        v.check(f'{prefix}grad_student_{index}', torch.zeros_like(tensor) if grad is None else grad)
    return total
