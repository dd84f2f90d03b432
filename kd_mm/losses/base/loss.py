"""What every distillation loss shares: levels, weights, precision."""

from typing import Any, Dict, List, Mapping, Optional, Protocol, Sequence, Tuple, Union, runtime_checkable

import torch
from torch import Tensor, nn

from kd_mm.losses.base.learner import Learner
from kd_mm.losses.base.opponent import Opponent
from kd_mm.ops.functional import average_to, lift
from kd_mm.ops.modulation import GradientShareSchedule
from kd_mm.ops.schedules import Weight
from kd_mm.regions.base import weights_of
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.dense import DenseView
from kd_mm.types.targets import valid_pixels

#: What a method computes: a scalar, or the named parts of one without their factors.
Value = Union[Tensor, Mapping[str, Tensor]]
#: Number of dimensions of a level -> what it is.
KINDS = {2: 'rows (M, C)', 3: 'tokens (N, L, C)', 4: 'maps (N, C, H, W)'}


# Rare abilities of a loss. A loss has one by having its methods; nothing is to be inherited or switched on.


@runtime_checkable
class ReadsModules(Protocol):
    """A loss that needs more of the tapped modules than their outputs."""

    def bind(self, student: Sequence[Any], teacher: Sequence[Any]) -> None:
        """Look at the tapped modules; called once, before ``prepare``, and in plain-tensor use by nobody.

        A loss may read parameters (a batch norm's, say) and must keep no reference: neither model is a part of it.

        Args:
            student: the module behind each level of the side that learns (the same one several times if it gives
                several).
            teacher: the module behind each level of the other side.
        """


@runtime_checkable
class PicksInstances(Protocol):
    """A loss that compares boxes which it chooses by what two dense heads predict.

    Attributes:
        heads_at: path of the head in both models; None if the boxes come from elsewhere.
    """

    heads_at: Optional[str]

    def choose_instances(self, student: DenseView, teacher: DenseView, batch: KDBatch) -> List[Tensor]:
        """Boxes (M, 4) of each image."""


@runtime_checkable
class Pretrained(Protocol):
    """A loss that uses what was learned from the teacher beforehand, see :mod:`kd_mm.losses.base.learner`.

    Attributes:
        learned: name of the argument that takes the file.
    """

    learned: str

    def learner(self) -> Learner:
        """What ``tools/learn_tokens.py`` trains."""


@runtime_checkable
class Adversarial(Protocol):
    """A loss that trains networks against the student, see :mod:`kd_mm.losses.base.opponent`."""

    def opponents(self) -> List[Opponent]:
        """The networks; known after ``prepare``."""


def opponents_of(loss: nn.Module) -> List[Opponent]:
    """The networks that a loss trains against the student; none for most."""
    return loss.opponents() if isinstance(loss, Adversarial) else []


class KDLoss(nn.Module):
    """Base of the losses: a method implements :meth:`level_loss` for one level and inherits the rest.

    A method that looks at all levels at once (a pyramid fusion, a relation between two layers) sets ``joint`` and
    implements :meth:`joint_loss` instead; it has one term and one weight.

    The total is ``sum_l weight_l(step) * level_loss_l``.  A method of several terms returns them by name, without
    their factors, and keeps the factors in :attr:`factors`: the base weights, sums, and hands each of them on to be
    logged (``loss_fgd/fg``).  Computation is in float32 under mixed precision (float64
    inputs stay float64), the teacher is detached, and the result is connected to the student even when a region is
    empty.

    What a batch does not hold adds 0, with a gradient of 0: no object, every pixel ignored, one cell for a loss on the
    differences between cells, one image for relations between images.  What the classes or channels of a model can
    never give is an error of :meth:`check_shapes`.

    Class attributes:
        joint: the levels are compared together, by :meth:`joint_loss`.
        logits: the loss compares class logits, so student and teacher must have the same classes.
        same_channels: student and teacher channels must be equal; an adapter is added by itself when they are not.
        same_size: student and teacher H and W must be equal; the automatic adapter resizes the student, bilinearly,
            when they are not [ours].
        pools_to: for a loss without ``same_size`` whose authors average-pool maps of different H and W [C]:
            'smaller' (both sides to the smaller H and the smaller W) or 'student' (the teacher to the student's).
            The base does it before :meth:`level_loss`, to a region's weights as well, so no adapter resizes anything.
        takes: numbers of dimensions that a level may have: 4 for maps (N, C, H, W), 2 for rows (M, C), 3 for tokens
            (N, L, C) that are no map. None if the method looks for itself; those of this package all say it.
        rows_only: the loss takes rows of proposals (M, ...), not maps.
        competes: the classes of a cell compete, by a softmax over all channels of a map.
        grows: the student may know more classes than the teacher, whose own come first and in the same order.
        needs_background: the first class is the background, which may hold classes that a model does not know.
        needs_boxes, needs_seg_map: the targets without which the loss means nothing.

    Attributes:
        factors: name of a part -> its factor; 1 for a part that is not there.

    What few methods need is a protocol: :class:`ReadsModules`, :class:`PicksInstances`, :class:`Pretrained`,
    :class:`Adversarial`.

    Args:
        loss_weight: number, list (one per level) or schedule, see :class:`kd_mm.ops.schedules.Weight`. Default 1.
    """

    joint = False
    logits = False
    same_channels = True
    same_size = True
    pools_to: Optional[str] = None
    takes: Optional[Tuple[int, ...]] = None
    rows_only = False
    competes = False
    grows = False
    needs_background = False
    needs_boxes = False
    needs_seg_map = False

    def __init__(self, loss_weight: Any = 1.0):
        super().__init__()
        self.weight = Weight(loss_weight, 'loss_weight', type(self).__name__)
        schedule = self.weight.schedule
        if any(isinstance(part, GradientShareSchedule) for part in getattr(schedule, 'schedules', ())):
            raise ValueError(f'{type(self).__name__}: loss_weight: a GradientShareSchedule changes by itself and '
                             'cannot be a part of a ProductSchedule; give it alone')
        #: of a weight that follows the gradients, for the state dict; None for numbers and pure schedules.
        self.modulation = schedule.state if isinstance(schedule, GradientShareSchedule) else None
        self.factors: Dict[str, float] = {}
        #: of maps: the images of a process without which there is nothing to learn in any step.
        self.fewest_images = 1

    def prepare(self, student: Features, teacher: Features) -> None:
        """Create the method's own trainable parts, sized by one pair of (adapted) features.

        Called before the optimizer sees the parameters; in plain-tensor use the first call does it.  A second call
        changes nothing.  The base has none.
        """

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Value:
        """Unweighted loss of one level: a scalar, or its parts by name.

        Args:
            level: index of the level, from 0.
            student: (N, C, H, W), already adapted and in full precision.
            teacher: (N, C, H, W), detached.
            batch: targets and the step.
            mask: region weights (N, 1, H, W), or None for everywhere.
        """
        raise NotImplementedError

    def joint_loss(self, student: Features, teacher: Features, batch: KDBatch,
                   masks: Sequence[Optional[Tensor]]) -> Value:
        """Unweighted loss of all levels together, for a class with ``joint``: a scalar, or its parts by name.

        Args: as :meth:`level_loss`, one entry a level.
        """
        raise NotImplementedError

    def parts(self, student: Features, teacher: Features, batch: Optional[KDBatch] = None,
              region: Optional[nn.Module] = None) -> List[Dict[str, Tensor]]:
        """The parts of each level's loss with their :attr:`factors`: name -> scalar (one dict in all for a ``joint``
        loss); the name is '' where there is only one.

        Raises:
            ValueError: the level counts or the shapes of a level differ, or a region is given for rows.
        """
        batch = KDBatch() if batch is None else batch
        student, teacher = as_features(student), as_features(teacher)
        self.check_shapes(student, teacher)
        for level, tensor in enumerate(student if region is not None else ()):
            if tensor.dim() != 4:
                raise ValueError(f'{type(self).__name__}, level {level}: a region needs maps (N, C, H, W), not '
                                 f'{tuple(tensor.shape)}. Remove `region`')
        # A region, a mask or an exp in half precision overflows at 65504; one conversion here serves every method.
        with torch.autocast(student[0].device.type, enabled=False):
            student = tuple(lift(tensor) for tensor in student)
            teacher = tuple(lift(tensor.detach()) for tensor in teacher)
            self.prepare(student, teacher)
            masks: List[Optional[Tensor]] = (
                [None] * len(student) if region is None else list(weights_of(region, teacher, batch)))
            if self.pools_to is not None:  # after the region, whose strides are those of the teacher's own map
                student, teacher, masks = self._pooled(student, teacher, masks)
            if self.joint:
                if not all(len(tensor) for tensor in student):
                    return [{'': sum((tensor.sum() * 0 for tensor in student[1:]), student[0].sum() * 0)}]
                return [self._weighed(self.joint_loss(student, teacher, batch, masks))]
            # A level may come without rows: proposals of a batch without objects.
            return [self._weighed(self.level_loss(level, student[level], teacher[level], batch, masks[level])
                                  if len(student[level]) else student[level].sum() * 0)
                    for level in range(len(student))]

    def _weighed(self, value: Value) -> Dict[str, Tensor]:
        if isinstance(value, Tensor):
            return {'': value}
        return {name: part * self.factors.get(name, 1.0) for name, part in value.items()}

    def per_level(self, student: Features, teacher: Features, batch: Optional[KDBatch] = None,
                  region: Optional[nn.Module] = None) -> List[Tensor]:
        """Losses without ``loss_weight``, one scalar a level (one in all for a ``joint`` loss).

        Raises:
            ValueError: see :meth:`parts`.
        """
        return [total(parts) for parts in self.parts(student, teacher, batch, region)]

    def forward(self, student: Features, teacher: Features, batch: Optional[KDBatch] = None,
                region: Optional[nn.Module] = None) -> Tensor:
        """Weighted sum over the levels, a scalar; ``student`` and ``teacher`` may be single tensors."""
        terms = self.per_level(student, teacher, batch, region)
        step, max_steps = (batch.info.step, batch.info.max_steps) if batch is not None else (0, 0)
        return weighted_sum(terms, self.weight.at(step, max_steps, len(terms)))

    def _pooled(self, student: Features, teacher: Features, masks: Sequence[Optional[Tensor]]) -> Tuple[
            Features, Features, List[Optional[Tensor]]]:
        """Maps and region weights of each level at the size of ``pools_to``; what is no map is left alone."""
        levels = []
        for s, t, mask in zip(student, teacher, masks):
            if s.dim() == 4:
                size = s.shape[2], s.shape[3]
                if self.pools_to == 'smaller':
                    size = min(size[0], t.shape[2]), min(size[1], t.shape[3])
                s, t = average_to(s, size), average_to(t, size)
                mask = None if mask is None else average_to(mask.to(s.dtype), size)
            levels.append((s, t, mask))
        return tuple(level[0] for level in levels), tuple(level[1] for level in levels), [level[2] for level in levels]

    def check_kinds(self, student: Features, teacher: Features) -> None:
        """Raise a ValueError with side, level and shape where a level is no kind of tensor that the loss takes."""
        takes = (2, ) if self.rows_only else self.takes
        for side, levels in (('student', student), ('teacher', teacher)):
            for level, tensor in enumerate(levels):
                if takes is None or tensor.dim() in takes:
                    continue
                if self.rows_only:
                    mend = "rows of proposals are needed: in a config a place such as at='@roi_logits'"
                else:
                    mend = f'{type(self).__name__} needs {" or ".join(KINDS[count] for count in sorted(takes)[::-1])}'
                    if tensor.dim() == 3:
                        mend += ('. Tokens that are the cells of a map become one with tokens=(H, W) or tokens=STRIDE; '
                                 "object queries are compared by DETRDistillLogitsLoss at='bbox_head' or MaskQueryLoss "
                                 "at='panoptic_head'")
                raise ValueError(f'{type(self).__name__}, level {level}: {side} {tuple(tensor.shape)} is '
                                 f'{kind_text(tensor)}, and {mend}')

    def check_shapes(self, student: Features, teacher: Features) -> None:
        """Raise a ValueError with level, shapes and mend where student and teacher cannot be compared."""
        name = type(self).__name__
        if not student or len(student) != len(teacher):
            raise ValueError(f'{name}: {len(student)} student levels and {len(teacher)} teacher levels. Choose the '
                             'same number with `levels`, or taps with the same number of outputs')
        self.check_kinds(student, teacher)
        for level, (s, t) in enumerate(zip(student, teacher)):
            where = f'{name}, level {level}: student {tuple(s.shape)} and teacher {tuple(t.shape)}'
            if s.dim() != t.dim() or s.dim() < 2 or s.shape[0] != t.shape[0]:
                raise ValueError(f'{where} are not outputs of the same kind for the same images: check the two taps')
            if self.same_channels and s.shape[1] != t.shape[1]:
                mend = ('tap features instead, or use a teacher with the same classes' if self.logits else
                        "add adapter=dict(type='ConvAdapter'), or leave `adapter` out")
                raise ValueError(f'{where} differ in {"classes" if self.logits else "channels"}: {mend}')
            if self.same_size and s.shape[2:] != t.shape[2:]:
                raise ValueError(f"{where} differ in size: add adapter=dict(type='ResizeAdapter'), or leave "
                                 '`adapter` out')


def kind_text(tensor: Tensor) -> str:
    """What a tensor is by its number of dimensions.

    Example:
        >>> kind_text(torch.zeros(2, 5, 8)), kind_text(torch.zeros(1, 1, 1, 1, 1))
        ('tokens (N, L, C)', 'of 5 dimensions')
    """
    return KINDS.get(tensor.dim(), f'of {tensor.dim()} dimensions')


def as_features(value: Any) -> Features:
    """A single tensor as one level; a sequence as a tuple."""
    return (value, ) if isinstance(value, Tensor) else tuple(value)


def total(parts: Mapping[str, Tensor]) -> Tensor:
    """Sum of the parts of a level."""
    values = list(parts.values())
    return sum(values[1:], values[0])


def weighted_sum(terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_l weights[l] * terms[l]``."""
    total = terms[0] * weights[0]
    for term, weight in zip(terms[1:], weights[1:]):
        total = total + term * weight
    return total


def needs_channels(owner: str, features: Features, least: int, reason: str, side: str = 'student') -> None:
    """Raise a ValueError where a level has so few channels (classes) that the loss is the same for every student.

    Args:
        owner: class name of the loss.
        features: L tensors (N, C, ...) or (M, C).
        least: the smallest C that has something to learn.
        reason: why fewer have not, and the mend.
        side: whose features.
    """
    for level, tensor in enumerate(features):
        if tensor.shape[1] < least:
            raise ValueError(f'{owner}, level {level}: {side} {tuple(tensor.shape)} has {tensor.shape[1]} channel(s) '
                             f'and {least} are needed, or nothing is learned: {reason}')


def needs_classes(owner: str, features: Features, standardise: bool, mend: str, what: str = 'class') -> None:
    """Raise a ValueError where a softmax over so few classes (bins) is the same for every student.

    Two standardised logits are always the same two numbers, up to their order.

    Args:
        owner: class name of the loss.
        features: L tensors (N, K, ...) or (M, K).
        standardise: whether the logits are standardised first.
        mend: what to use instead.
        what: the things that the softmax is over.
    """
    reason = f'the softmax over one {what} is always 1'
    if standardise:
        reason = f'standardise=True leaves nothing but the order of two. Use standardise=False with two; {reason}'
    needs_channels(owner, features, 3 if standardise else 2, f'{reason}. {mend}')


def labelled(logits: Tensor, batch: KDBatch, mask: Optional[Tensor]) -> Optional[Tensor]:
    """Region weights with the ignored pixels set to 0; None when nothing is to be left out.

    Args:
        logits: (N, K, H, W) gives the size; RoI rows (M, K) have no pixels and keep ``mask``.
        batch: its segmentation labels, if it has any.
        mask: (N, 1, H, W) or None.
    """
    valid = valid_pixels(batch, (logits.shape[2], logits.shape[3])) if logits.dim() == 4 else None
    if valid is None:
        return mask
    valid = valid[:, None].to(device=logits.device, dtype=logits.dtype)
    return valid if mask is None else mask * valid
