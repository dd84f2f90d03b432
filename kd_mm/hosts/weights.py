"""Load the weights of a checkpoint into a model: convert keys, find prefixes, report what does not fit."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from kd_mm.hosts import checkpoint as ckpt
from kd_mm.hosts import deployed
from kd_mm.hosts.growing import COPY, GROW, WAYS, Names, grow_head
from kd_mm.ops.words import count


def load_weights(model: nn.Module, checkpoint: Dict[str, Any], source: Any, strict: bool = True) -> List[str]:
    """Load the weights of a checkpoint into ``model``, converted as the modules themselves convert older files.

    Of several sets in a file, and of keys below common prefixes (``module.``, ``teacher.``), those are taken with which
    most keys fit (:func:`kd_mm.hosts.checkpoint.best_fit`).  Re-parametrised blocks take the form that they have in the
    file (:func:`kd_mm.hosts.deployed.take_form`).

    Args:
        model: the network.
        checkpoint: as :func:`kd_mm.hosts.checkpoint.load` gives it, or a state dict.
        source: its path, for messages.
        strict: whether every key must fit. False leaves what does not fit as it was built.

    Returns:
        What was mapped or tolerated, as sentences; empty when the keys were the model's own.

    Raises:
        ValueError: keys are missing, left over or of another shape, and ``strict`` is true; or no key fits at all.
    """
    if strict not in (True, False):
        raise ValueError(f'teacher_strict={strict!r} must be True or False')
    own = model.state_dict()
    sets = ckpt.weight_sets(checkpoint)
    fit = ckpt.best_fit(own, sets)
    if fit is None:
        raise ValueError(f'teacher checkpoint {source} holds no weights; its entries are {_some(list(checkpoint))}. '
                         'Give a file of torch.save(dict(state_dict=model.state_dict()), path)')
    if fit.add:
        # Some models put prefixes on plain keys themselves (mmdet's semi-supervised ones), on more than one copy.
        before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in own.items()}
        plain = _load(model, sets[fit.where])
        if len(own) - len(plain.unset) > fit.fitting:
            fit = ckpt.Fit(fit.where, '', '', 0, 0)
        model.load_state_dict(before)
    everything = sets[fit.where]
    state = ckpt.strip(everything, fit.prefix, fit.add)
    form = deployed.take_form(model, state)
    own = model.state_dict()
    found = _load(model, state)
    if own and all(key in found.unset for key in own if not key.endswith('num_batches_tracked')):
        raise ValueError(f'teacher checkpoint {source}: {_nothing_fits(model, own, everything, found)}')
    notes = _mapped(fit, len(everything) - len(state), found) + form
    faults = []
    if found.missing:
        faults.append(f'leaves {len(found.missing)} of {len(own)} keys unset ({_some(found.missing)})')
    if found.extra:
        faults.append(f'has {count(len(found.extra), "key")} the model does not have ({_some(found.extra)})')
    if found.shapes:
        key = found.shapes[0]
        faults.append(f'has {count(len(found.shapes), "key")} of another shape ({key}: file {found.sizes[key]}, model '
                      f'{tuple(own[key].shape)})')
    faults += found.errors
    whole = _whole_modules(model, own, found.unset)
    if whole:
        faults.append(f'gives no weights to whole modules, which stay as they were built, random as a rule: '
                      f'{", ".join(whole[:8])}{", ..." if len(whole) > 8 else ""}')
    if faults and strict:
        raise ValueError(f'teacher checkpoint {source} {"; ".join(notes + faults)}: wrong file for this config? '
                         'If it is meant so, set teacher_strict=False')
    return notes + faults


@dataclass
class _Loaded:
    """What became of the keys of a state dict that was loaded."""

    missing: List[str]
    extra: List[str]
    shapes: List[str]
    sizes: Dict[str, Any]
    #: second copies of the model's own keys under flat names
    copies: List[str]
    #: keys of the file that the modules renamed
    converted: List[str]
    errors: List[str]

    @property
    def unset(self) -> Set[str]:
        return {*self.missing, *self.shapes}


def _load(model: nn.Module, state: Dict[str, Tensor]) -> _Loaded:
    """Load what fits, after every module's own conversion of the keys (``_load_from_state_dict`` and its hooks).

    As ``nn.Module.load_state_dict``, but what does not fit is found by key, and every module sees all keys: older
    names may lie outside of the module that converts them (mmcv's ``conv2_offset`` beside ``conv2``).
    """
    versions = getattr(state, '_metadata', None) or {}
    converted, errors = OrderedDict(state), []  # type: ignore[var-annotated]
    missing: List[str] = []
    extra: List[str] = []

    def load(module: nn.Module, prefix: str) -> None:
        module._load_from_state_dict(converted, prefix, dict(versions.get(prefix[:-1], {})), False, missing, extra,
                                     errors)
        for name, child in module._modules.items():
            if child is not None:
                load(child, f'{prefix}{name}.')
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, _IncompatibleKeys(missing, extra))

    load(model, '')
    own = model.state_dict()
    # Batch norms of files before torch 0.4.1 count no batches, and nothing here reads the count.
    absent = [key for key in own if key not in converted and not key.endswith('num_batches_tracked')]
    sizes = {key: tuple(getattr(converted[key], 'shape', ())) for key in own if key in converted}
    # torch takes one number as a scalar.
    shapes = [key for key, size in sizes.items() if isinstance(own[key], Tensor)
              and size != tuple(own[key].shape) and (size, tuple(own[key].shape)) != ((1, ), ())]
    left = [key for key in converted if key not in own]
    flat = {key.replace('.', '_') for key in own if key in converted}
    copies = [key for key in left if '.' not in key and key.partition('_')[2] in flat]
    return _Loaded(
        absent, [key for key in left if key not in copies], shapes, sizes, copies,
        [key for key in state if key not in own and key not in converted],
        [error for error in errors if 'size mismatch' not in error])


def _mapped(fit: ckpt.Fit, outside: int, found: _Loaded) -> List[str]:
    """What was done to make a file's keys those of the model, in words."""
    notes = []
    usual = fit.where in ('', 'state_dict', 'model')
    if not usual or fit.prefix or fit.add or fit.rivals:
        done = (f'took the weights below the prefix {fit.prefix!r}' if fit.prefix else
                f'took the weights for {fit.add[:-1]!r} of the model' if fit.add else 'took the weights')
        places = {fit.where, *(rival.where for rival in fit.rivals)}
        if fit.where and (not usual or len(places) > 1):
            done += f' of its {fit.where!r}'
        if outside:
            done += f' and left {outside} other keys'
        equal = [rival for rival in fit.rivals if rival.fitting == fit.fitting]
        others = ', '.join(rival.name(len(places) > 1) for rival in (equal or fit.rivals)[:3])
        if equal:
            done += (f"; {others} would fit as well ('teacher' goes first, then what the file has first): to take "
                     'that, save it alone')
        elif others:
            done += f'; they fit best ({fit.fitting} keys, {fit.rivals[0].fitting} with {others})'
        notes.append(done)
    if found.copies:
        notes.append(f'has {len(found.copies)} second copies of weights, as an averaging hook writes them '
                     f'({_some(found.copies)}): the plain keys were taken')
    if found.converted:
        notes.append(f'has {len(found.converted)} keys under older names, which the model itself converts '
                     f'({_some(found.converted)})')
    return notes


def _nothing_fits(model: nn.Module, own: Dict[str, Any], state: Dict[str, Tensor], found: _Loaded) -> str:
    keys = list(state)
    if found.shapes:
        key = found.shapes[0]
        return (f'no key fits {type(model).__name__}, whatever teacher_strict says: the names are right, but all '
                f'shapes are others ({key}: file {found.sizes[key]}, model {tuple(own[key].shape)}). Give the config '
                'that the file was trained with')
    prefix = ckpt.common_prefix(keys)
    return (f'no key fits {type(model).__name__}, whatever teacher_strict says. Its keys '
            + (f'all begin with {prefix!r}' if prefix else 'have no common prefix')
            + f' ({_some(keys)}); the model has {_some(list(own))}. Give the file of this config, or save the weights '
            "under the model's names: torch.save(dict(state_dict={name: tensor}), path)")


def _whole_modules(model: nn.Module, own: Dict[str, Any], unset: Set[str]) -> List[str]:
    """The outermost modules of which no key was set."""
    names: List[str] = []
    for name, _ in model.named_modules():
        keys = [key for key in own if key.startswith(f'{name}.') and not key.endswith('num_batches_tracked')]
        if name and keys and unset.issuperset(keys) and not any(name.startswith(f'{outer}.') for outer in names):
            names.append(name)
    return names


def _some(keys: Sequence[Any]) -> str:
    return ', '.join(map(str, keys[:3])) + (', ...' if len(keys) > 3 else '')


def ways_to_inherit(inherit: Any) -> Dict[str, str]:
    """``inherit`` as module path -> how, see :data:`kd_mm.hosts.growing.WAYS`.

    Example:
        >>> ways_to_inherit('neck'), ways_to_inherit(dict(neck='copy', bbox_head='grow'))
        ({'neck': 'copy'}, {'neck': 'copy', 'bbox_head': 'grow'})
    """
    if isinstance(inherit, str):
        return {inherit: COPY}
    return dict(inherit) if isinstance(inherit, Mapping) else dict.fromkeys(inherit, COPY)


def inherit_weights(student: nn.Module, teacher: nn.Module, paths: Any, apply: bool = True,
                    classes: Names = (None, None), notes: Optional[List[str]] = None) -> List[str]:
    """Give modules of the student (``'neck'``, ``'bbox_head'``) the weights of the same modules of the teacher.

    Args:
        paths: of the modules, or path -> ``'copy'``, ``'grow'`` or ``'grow_from_background'``, see
            :func:`kd_mm.hosts.growing.grow_head`.
        apply: False only looks.
        classes: class names of the student and of the teacher, for those that grow.
        notes: gets sentences about those that grow.

    Returns:
        Problems, as sentences; nothing is copied when there is one.
    """
    problems, pairs, grown = [], [], []
    modules = dict(student.named_modules()), dict(teacher.named_modules())
    for path, way in ways_to_inherit(paths).items():
        if path not in modules[0] or path not in modules[1]:
            side = 'student' if path not in modules[0] else 'teacher'
            children = [name for name, _ in (student if side == 'student' else teacher).named_children()]
            problems.append(f'inherit: {side} has no module {path!r}; it has {", ".join(children)}')
            continue
        if way not in WAYS:
            problems.append(f'inherit: {path!r}: {way!r} is none of {", ".join(map(repr, WAYS))}')
            continue
        if way != COPY:
            growth = grow_head(path, modules[0][path], modules[1][path], classes, way)
            grown.append((growth, path))
            problems += growth.problems
            continue
        own, other = modules[0][path].state_dict(), modules[1][path].state_dict()
        different = [key for key in own if key not in other or own[key].shape != other[key].shape]
        different += [key for key in other if key not in own]
        if different:
            key = different[0]
            shapes = [tuple(state[key].shape) if key in state else 'missing' for state in (own, other)]
            more = (f"; a head with more classes grows by name: inherit=dict({path}={GROW!r})"
                    if path.isidentifier() and path.endswith('head') else '')
            problems.append(f'inherit: {path!r} differs between student and teacher in {len(different)} entries '
                            f'({key}: student {shapes[0]}, teacher {shapes[1]}); inherit modules that are equal only'
                            f'{more}')
        pairs.append((modules[0][path], other))
    if problems:
        return problems
    if apply:
        for module, state in pairs:
            module.load_state_dict(state)
        for growth, path in grown:
            growth.apply(modules[0][path], modules[1][path])
    if notes is not None:
        notes += [note for growth, _ in grown for note in growth.notes]
    return problems
