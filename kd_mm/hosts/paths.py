"""Paths: the module or method of a model that a string names."""

import difflib
import fnmatch
from typing import Any, List, Tuple

from torch import nn

#: After the path of a residual block: the sum that its last ReLU takes, which no module returns.
PRE_RELU = ':pre_relu'


def expand_paths(model: nn.Module, path: Any) -> List[str]:
    """Module paths for ``at``: a path, a list of paths, or a pattern such as ``neck.fpn_convs.*`` (in model order)."""
    paths: List[str] = []
    for part in [path] if isinstance(path, str) else list(path):
        if any(letter in part for letter in '*?['):
            suffix = PRE_RELU if part.endswith(PRE_RELU) else ''
            pattern = part.removesuffix(PRE_RELU)
            depth = pattern.count('.')
            found = [name + suffix for name, _ in model.named_modules()
                     if name.count('.') == depth and fnmatch.fnmatchcase(name, pattern)]
            paths.extend(found or [part])
        else:
            paths.append(part)
    return paths


def resolve(model: nn.Module, path: str, side: str = 'model') -> Tuple[Any, str]:
    """The instance and the method name behind a tap path.

    Args:
        model: the student or the teacher.
        path: ``''`` (the model itself), ``'neck'``, ``'backbone.layer4.2'`` (a module: its ``forward``),
            ``'bbox_head.get_targets'`` (a method) or ``'backbone.layer4.2:pre_relu'`` (the ``relu`` of a residual
            block, see :data:`PRE_RELU`).
        side: word for the message.

    Raises:
        KeyError: nothing of that name; the closest paths are listed.
    """
    if path.endswith(PRE_RELU):
        relu = getattr(resolve(model, path.removesuffix(PRE_RELU), side)[0], 'relu', None)
        if not isinstance(relu, nn.Module):
            raise KeyError(f'{side}: {path!r} is the sum that the last ReLU of a residual block takes, and '
                           f'{path.removesuffix(PRE_RELU)!r} has no `relu`. Tap its last norm')
        return relu, 'forward'
    if not path:
        return model, 'forward'
    owner: Any = model
    parts = path.split('.')
    for position, part in enumerate(parts):
        child = getattr(owner, part, None) if part else None
        if child is None and isinstance(owner, (nn.ModuleList, nn.Sequential)) and part.lstrip('-').isdigit():
            child = owner[int(part)] if -len(owner) <= int(part) < len(owner) else None
        if isinstance(child, nn.Module):
            owner = child
        elif callable(child) and position == len(parts) - 1:
            return owner, part
        else:
            names = [name for name, _ in model.named_modules() if name]
            close = difflib.get_close_matches(path, names, n=3, cutoff=0.5)
            parent = '.'.join(parts[:position])
            children = [name for name, _ in owner.named_children()] if isinstance(owner, nn.Module) else []
            hint = f' Closest: {", ".join(map(repr, close))}.' if close else ''
            if close and side.split()[0] in ('student', 'teacher'):
                hint += f' Where it has another path than the other model: {side.split()[0]}_at={close[0]!r}.'
            inside = f' {parent or type(model).__name__} has: {", ".join(children)}.' if children else ''
            raise KeyError(f'{side} has no module {path!r}.{hint}{inside} '
                           'List all: kd-mm taps CONFIG')
    return owner, 'forward'


def module_at(model: nn.Module, path: str, side: str = 'model') -> Any:
    """The module that a tap path names: for ``':pre_relu'`` the residual block."""
    return resolve(model, path.removesuffix(PRE_RELU), side)[0]
