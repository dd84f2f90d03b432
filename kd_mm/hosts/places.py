"""Names for places that every model has under another path: ``'@backbone'``, ``'@neck'``, ``'@memory'``, ``'@logits'``.

``@backbone`` is the backbone.  ``@neck`` is the neck; where there is none, the pixel decoder of a mask transformer;
else the backbone.  ``@memory`` is the encoder's output of a DETR-type detector, as maps.  ``@logits`` are the dense
class logits, before sigmoid or softmax: those of a one-stage head, of the region proposals of a two-stage detector, or
of a segmentor's head.  Mask transformers for segmentation (MaskFormer, Mask2Former) have none; theirs are the logarithm
of the scores that they predict with, see :func:`kd_mm.hosts.picks.semantic_logits`.  ``@output`` is what a model of no
host returns as a whole.

The places of :data:`SHARED` are what both models say about the same proposals or the same priors.

A head whose logits are somewhere else gets its line in the entry of its host (:mod:`kd_mm.hosts.known`), by the name
of its class, once for all configs.
"""

import fnmatch
from dataclasses import dataclass, replace
from typing import Any, Callable, Iterator, Optional, Sequence, Tuple

from torch import Tensor, nn

from kd_mm.hosts.meaning import Meaning, branch_meaning, class_meaning
from kd_mm.hosts.models import task_of
from kd_mm.hosts.picks import maps as only_maps
from kd_mm.hosts.table import Line, Pick, line, nearest
from kd_mm.types.batch import Features

MARK = '@'
PLACES = ('@backbone', '@neck', '@memory', '@logits', '@output')
#: Places that are rows of proposals which both models are asked about, see :mod:`kd_mm.hosts.heads.proposals`.
ROWS = ('@roi_logits', '@roi_boxes', '@roi_masks', '@roi_features', '@rpn_logits', '@rpn_boxes')
#: Masks that one-stage heads make from kernels, at the same priors, see :mod:`kd_mm.hosts.heads.instance_masks`.
INSTANCE_MASKS = '@instance_masks'
#: Every place at which both models are asked about the same things.
SHARED = (*ROWS, INSTANCE_MASKS)


@dataclass(frozen=True)
class Place:
    """Where a place is in one model.

    Attributes:
        paths: tap paths; ``*`` as in :func:`kd_mm.hosts.paths.expand_paths`.
        pick: what to take of the outputs; None for all of it.
        meaning: what the channels are; None for features.
    """

    paths: Tuple[str, ...]
    pick: Optional[Callable[[Features], Features]] = None
    meaning: Optional[Meaning] = None


def _memory(outputs: Features) -> Features:
    """The neck's maps and the encoder's tokens (N, P, C) -> the tokens as maps.

    All levels of the neck go into the encoder, or (DETR, DAB-DETR) the last one alone.
    """
    return split_levels(outputs[-1], outputs[:-1])


def split_levels(tokens: Tensor, maps: Sequence[Tensor]) -> Features:
    """Tokens (N, P, C) as the levels that they came from: one or more (N, C, H, W).

    Args:
        maps: those levels; all of them, or else the last one alone, have P cells.

    Raises:
        ValueError: neither has.

    Example:
        >>> import torch
        >>> maps = [torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 2, 2)]
        >>> [tuple(level.shape) for level in split_levels(torch.zeros(2, 20, 8), maps)]
        [(2, 8, 4, 4), (2, 8, 2, 2)]
    """
    for levels in (list(maps), list(maps[-1:])):
        sizes = [(int(level.shape[2]), int(level.shape[3])) for level in levels]
        counts = [height * width for height, width in sizes]
        if sum(counts) == tokens.shape[1]:
            return tuple(part.transpose(1, 2).unflatten(2, size)
                         for part, size in zip(tokens.split(counts, dim=1), sizes))
    raise ValueError(f'{tokens.shape[1]} tokens of the encoder do not come from levels of '
                     f'{[tuple(level.shape[2:]) for level in maps]} cells')


#: A backbone that in training hands on each image as often as it has branches (of shared weights).
TRIDENT = 'TridentResNet'
def find(model: nn.Module, place: str) -> Place:
    """Where ``place`` is in ``model``.

    Raises:
        KeyError: no such name, or the model has no such place; the message says what to write instead.

    Example:
        >>> model = nn.Module(); model.backbone = nn.Identity()
        >>> find(model, '@neck').paths
        ('backbone',)
    """
    if place not in PLACES:
        if place in SHARED:
            raise KeyError(f'{place!r} gives rows and stands alone: at={place!r}, for both models')
        raise KeyError(f'{place!r} is no place; there are {", ".join(map(repr, (*PLACES, *SHARED)))}')
    found, backbone = _find(model, place), _lookup(model, 'backbone')
    if any(cls.__name__ == TRIDENT for cls in type(backbone).__mro__):
        return replace(found, pick=_test_branch(backbone, found.pick))
    return found


def _find(model: nn.Module, place: str) -> Place:
    if place == '@logits':
        return _logits(model)
    if place == '@output':
        if task_of(model) is not None:
            raise KeyError(f"'@output' is what a model of no host returns; {type(model).__name__} is a model of one. "
                           "Tap '@backbone', '@neck' or '@logits'")
        return Place(('', ))
    if place == '@memory':
        if not callable(getattr(model, 'forward_encoder', None)) or not isinstance(_lookup(model, 'neck'), nn.Module):
            raise KeyError(f"{type(model).__name__} has no encoder of tokens ('@memory'), as DETR-type detectors have. "
                           "Tap '@neck', or give a module path")
        return Place(('neck', 'forward_encoder'), _memory)
    candidates = ('backbone', ) if place == '@backbone' else (
        'neck', 'panoptic_head.pixel_decoder', 'decode_head.pixel_decoder', 'backbone')
    for path in candidates:
        module = _lookup(model, path)
        if isinstance(module, nn.Module):
            pick = nearest(module, 'backbones') or only_maps
            return Place((path, ), _bind(pick, module))
    raise KeyError(f'{type(model).__name__} has none of {", ".join(candidates)} for {place!r}; give a module path')


#: Where a model keeps its dense heads; '@logits' is the first that there is.
HEADS = ('bbox_head', 'mask_head', 'rpn_head', 'decode_head')
#: The first stage of a detector: its logits say whether there is an object, and not of which class.
PROPOSAL_HEAD = 'rpn_head'


def _heads(model: nn.Module, path: str) -> Iterator[Tuple[str, nn.Module]]:
    """Path and module of the heads behind one name: a cascade is a list, or one module with a list inside."""
    head = _lookup(model, path)
    if not isinstance(head, nn.Module):
        return
    members = [(f'{path}.{index}', member) for index, member in enumerate(head)] if isinstance(
        head, nn.ModuleList) else [(path, head)]
    for name, member in members:
        stages = getattr(member, 'stages', None)
        if isinstance(stages, nn.ModuleList) and not _entry(member):
            yield from ((f'{name}.stages.{index}', stage) for index, stage in enumerate(stages))
        else:
            yield name, member


def _logits(model: nn.Module) -> Place:
    for path in HEADS:
        # A cascade refines its prediction: the last head that is dense counts.
        for name, member in reversed(list(_heads(model, path))):
            entry = _entry(member)
            if entry is not None:
                paths = tuple(f'{name}.{path}' if path else name for path in entry[0])
                pick = None if entry[1] is None else _bind(entry[1], member)
                return Place(paths, pick, class_meaning(member, path == PROPOSAL_HEAD))
    heads = [type(_lookup(model, path)).__name__ for path in ('bbox_head', 'rpn_head', 'panoptic_head', 'decode_head')
             if isinstance(_lookup(model, path), nn.Module)]
    raise KeyError(f'{type(model).__name__} with {", ".join(heads) or "no known head"} has no dense class logits that '
                   "are known here ('@logits'): tap features ('@neck'), give the path of the logits, or add a line for "
                   'the head to the entry of its host (docs/hosts.md)')


def meaning_at(model: nn.Module, path: str) -> Optional[Meaning]:
    """What the channels at a module path mean; None where the tables do not say, as for all features.

    Example:
        >>> meaning_at(nn.Linear(1, 1), 'neck')
    """
    for name in (*HEADS, 'auxiliary_head'):
        for place, head in _heads(model, name):
            if path != place and not path.startswith(f'{place}.'):
                continue
            branch, entry = path[len(place) + 1:], _entry(head)
            # What a pick makes of a module is not what the module itself gives.
            patterns = entry[0] if entry is not None and entry[1] is None else ()
            if any(fnmatch.fnmatchcase(branch, pattern) and branch.count('.') == pattern.count('.')
                   for pattern in patterns):
                return class_meaning(head, name == PROPOSAL_HEAD)
            return branch_meaning(head, branch)
    return None


def head_meaning(model: nn.Module, path: str) -> Optional[Meaning]:
    """What the class logits of the dense head at ``path`` mean; None for other modules."""
    for name in HEADS:
        for place, head in _heads(model, name):
            if path == place and _entry(head) is not None:
                return class_meaning(head, name == PROPOSAL_HEAD)
    return None


def class_branches(head: nn.Module) -> Tuple[str, ...]:
    """Patterns of the modules below a dense head that give its class logits as they are; empty for other modules.

    Example:
        >>> class GFLHead(nn.Module):
        ...     gfl_cls = nn.Identity()
        >>> class_branches(GFLHead()), class_branches(nn.Identity())
        (('gfl_cls',), ())
    """
    entry = _entry(head)
    return tuple(path for path in entry[0] if path) if entry is not None and entry[1] is None else ()


def _test_branch(backbone: Any, pick: Optional[Callable[[Features], Features]]) -> Callable[[Features], Features]:
    """Keep the test branch.  In training TridentNet repeats the batch once per branch."""
    def chosen(outputs: Features) -> Features:
        if backbone.training and backbone.test_branch_idx != -1:
            outputs = tuple(tensor.chunk(backbone.num_branch)[backbone.test_branch_idx] for tensor in outputs)
        return outputs if pick is None else pick(outputs)
    return chosen


def _bind(pick: Pick, head: Any) -> Callable[[Features], Features]:
    return lambda outputs: pick(head, outputs)


def _entry(head: nn.Module) -> Optional[Line]:
    """The table's line for the closest class of a head."""
    for cls in type(head).__mro__:
        if line(cls, 'no_logits'):
            return None
        entry: Optional[Line] = line(cls, 'logits')
        if entry is not None:
            paths, _ = entry
            if all(not path or isinstance(_lookup(head, path.removesuffix('.*')), nn.Module) for path in paths):
                return entry
    return None


def _lookup(owner: Any, path: str) -> Any:
    for part in path.split('.'):
        owner = getattr(owner, part, None)
    return owner
