"""The cross-head pass: a student's tower features through the rest of the teacher's head (CrossKD, CVPR 2024).

The teacher's own ``forward`` runs.  During the call the convolutions to be left out are replaced: they pass their input
on, and the last of them returns the student's features.  Predictors, scales, decoding and auxiliary branches thus stay
the teacher's, for every kind of head.  :class:`kd_mm.teachers.base.Teacher` has set its norms to eval mode and its
parameters to need no gradient; the gradient passes through to the student.
"""

from contextlib import ExitStack
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.hosts.heads.dense import box_paths
from kd_mm.hosts.swap import swapped
from kd_mm.hosts.table import nearest
from kd_mm.ops.checks import one_of
from kd_mm.ops.functional import align_moments, lift
from kd_mm.types.dense import STAGES

#: Names of the towers of a head: RetinaNet, FCOS, ATSS, GFL and most others; YOLOX; YOLOF.
TOWERS = (('cls_convs', 'reg_convs'), ('multi_level_cls_convs', 'multi_level_reg_convs'), ('cls_subnet', 'bbox_subnet'))


def towers(head: nn.Module) -> Dict[str, List[List[str]]]:
    """Paths of the convolutions of each tower, in order: one list where the levels share them, else one a level.

    Raises:
        ValueError: the head has no towers of this kind.
    """
    own, modules = nearest(head, 'towers') or (), dict(head.named_modules())
    if own and all(name in modules for name in own):
        return {name: [_blocks(level, f'{name}.{index}') for index, level in enumerate(modules[name].children())]
                for name in own}
    for names in TOWERS:
        found = [getattr(head, name, None) for name in names]
        if all(isinstance(tower, (nn.ModuleList, nn.Sequential)) and len(tower) for tower in found):
            if set(found[0].modules()) & set(found[1].modules()):  # type: ignore[union-attr]
                raise ValueError(f'{type(head).__name__}: {" and ".join(names)} are the same convolutions (RTMDet-Ins '
                                 'of mmdet is made like this), so a cross-head pass cannot enter one of them alone. '
                                 'Use another loss on heads, such as BCKDLoss')
            result = {}
            for name in names:
                tower = getattr(head, name)
                nested = isinstance(tower[0], (nn.ModuleList, nn.Sequential))
                result[name] = ([[f'{name}.{level}.{index}' for index in range(len(tower[level]))]
                                 for level in range(len(tower))] if nested
                                else [[f'{name}.{index}' for index in range(len(tower))]])
            return result
    raise ValueError(f'{type(head).__name__} has no towers of convolutions (cls_convs and reg_convs) that a cross-head '
                     'pass could enter')


def _blocks(level: nn.Module, path: str) -> List[str]:
    """Paths of the blocks of one level of a tower: it is one block, or holds some, with a bare predictor after them."""
    if hasattr(level, 'activate') or hasattr(level, 'pointwise_conv'):
        return [path]
    return [found for index, part in enumerate(level.children()) for found in _blocks(part, f'{path}.{index}')]


def default_index(head: nn.Module) -> int:
    """All convolutions of a tower but the last: 3 of the usual 4, as published."""
    return max(len(next(iter(towers(head).values()))[0]) - 1, 1)


def _held(head: nn.Module, index: int) -> Dict[str, List[str]]:
    """Path of the convolution number ``index`` (counted from 1) of each tower: one, or one a level."""
    result = {}
    for name, levels in towers(head).items():
        if not 1 <= index <= min(map(len, levels)):
            raise ValueError(f'{type(head).__name__}.{name} has {min(map(len, levels))} convolutions; index={index} '
                             'must be from 1 to that')
        result[name] = [paths[index - 1] for paths in levels]
    return result


def _before_activation(head: nn.Module, path: str) -> str:
    """The sub-module of a convolution block whose output its activation takes."""
    block: Any = head.get_submodule(path)
    if hasattr(block, 'pointwise_conv'):  # a depthwise-separable block is two blocks
        path, block = f'{path}.pointwise_conv', block.pointwise_conv
    if not getattr(block, 'with_activation', False) or tuple(getattr(block, 'order', ()))[-1:] != ('act', ):
        raise ValueError(f'{type(head).__name__}: {path} is no block of a convolution, a norm and an activation, so '
                         "there is nothing before an activation. Use stage='post_activation'")
    return f'{path}.{block.norm_name}' if block.with_norm else f'{path}.conv'


def tower_taps(head: nn.Module, index: int, stage: str = 'pre_activation') -> Dict[str, List[str]]:
    """Where to tap the towers of a head, by tower: one path that fires once a level, or one path a level.

    Args:
        head: a dense head.
        index: how many convolutions of each tower the feature has behind it, from 1.
        stage: 'pre_activation' or 'post_activation' of the last of them.

    Raises:
        ValueError: the head has no such place.
    """
    one_of('tower_taps', 'stage', stage, STAGES)
    return {name: [path if stage == 'post_activation' else _before_activation(head, path) for path in paths]
            for name, paths in _held(head, index).items()}


def held_features(taps: Mapping[str, Sequence[str]],
                  records: Mapping[str, Sequence[Tensor]]) -> Dict[str, List[Tensor]]:
    """Features at :func:`tower_taps`, by tower, one a level."""
    return {name: [tensor for path in paths for tensor in records[path]] for name, paths in taps.items()}


def _unlike(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> str:
    """In what two lists of maps differ, in words; the first thing of number, width and size."""
    if len(student) != len(teacher):
        return f'the student has {len(student)} levels and the teacher {len(teacher)}'
    level = next(index for index, (s, t) in enumerate(zip(student, teacher)) if s.shape != t.shape)
    own, theirs = student[level].shape, teacher[level].shape
    if own[1] != theirs[1]:
        return f'the student has {own[1]} channels and the teacher {theirs[1]}'
    return (f'level {level} has {"x".join(map(str, own[2:]))} cells in the student and '
            f'{"x".join(map(str, theirs[2:]))} in the teacher')


def cross_head_outputs(head: nn.Module, inputs: Any, student: Mapping[str, Sequence[Tensor]],
                       teacher: Mapping[str, Sequence[Tensor]], index: int, align: bool = True,
                       eps: float = 1e-6, numbers: Optional[List[Tensor]] = None) -> Any:
    """What the teacher's head makes of a student's tower features: the same kind of output as its ``forward``.

    The features are given the teacher's moments (``align``), go through the teacher's activation, then through the
    rest of its towers and its predictors.

    Args:
        head: the teacher's.
        inputs: what its ``forward`` was given; only shapes matter.
        student: features by tower, one a level.
        teacher: its own features of the same place.
        index: convolutions that the features have behind them.
        align: whether to rescale, see :func:`align_moments`.
        eps: see there.
        numbers: gets what the head gives at :func:`kd_mm.hosts.heads.dense.box_paths`.

    Raises:
        ValueError: the features do not fit.
    """
    forwards: Dict[nn.Module, Any] = {}
    for name, levels in towers(head).items():
        own, theirs = list(student[name]), list(teacher[name])
        if len(own) != len(theirs) or any(s.shape != t.shape for s, t in zip(own, theirs)):
            raise ValueError(
                f'cross-head pass, {name}: {_unlike(own, theirs)}. The heads must have the same feat_channels, strides '
                'and number of levels')
        for position, paths in enumerate(levels):
            features = own if len(levels) == 1 else own[position:position + 1]
            others = theirs if len(levels) == 1 else theirs[position:position + 1]
            for path in paths[:index - 1]:
                forwards[head.get_submodule(path)] = _hand_on
            block = head.get_submodule(paths[index - 1])
            forwards[block] = _hand_out(block, list(zip(features, others)), align, eps)
    for path in box_paths(head) if numbers is not None else ():
        module = head.get_submodule(path)
        forwards[module] = _noting(module.forward, numbers)
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.enter_context(swapped(module, 'forward', forward))
        return head(inputs)


def _noting(forward: Any, found: Optional[List[Tensor]]) -> Any:
    """A forward that notes what it returns."""

    def noted(value: Tensor) -> Tensor:
        output = forward(value)
        if found is not None:
            found.append(output)
        return output

    return noted


def _hand_on(value: Tensor) -> Tensor:
    return value


def _hand_out(block: Any, pairs: List[Tuple[Tensor, Tensor]], align: bool, eps: float) -> Any:
    """A forward that gives the next level's student feature, aligned and activated."""
    waiting = iter(pairs)
    activate = getattr(getattr(block, 'pointwise_conv', block), 'activate', None)

    def forward(_: Tensor) -> Tensor:
        student, teacher = next(waiting)
        with torch.autocast(student.device.type, enabled=False):
            # A tensor of its own in both cases: the activation works in place.
            value = align_moments(lift(student), lift(teacher), eps) if align else student.clone()
            return value if activate is None else activate(value)

    return forward
