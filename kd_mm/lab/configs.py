"""Distillation configs: read, look for mistakes, make them run without downloads."""

import ast
import math
import os
import types
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple
from urllib.parse import urlparse

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import HOOKS as ENGINE_HOOKS
from mmengine.utils import get_installed_path
from torch import nn

from kd_mm.engine.arguments import argument_faults
from kd_mm.engine.holding import refusal
from kd_mm.engine.hook import SEVERAL_OPTIMIZERS, DistillHook, listed
from kd_mm.engine.vis import NOTHING_TO_DRAW, DistillVisHook
from kd_mm.hosts import checkpoint as ckpt
from kd_mm.hosts.files import read_file
from kd_mm.hosts.models import default_weights, load_config, scope_of_config
from kd_mm.hosts.packages import installed, missing
from kd_mm.hosts.renamed import no_such_config
from kd_mm.hosts.table import host_of_config, scopes
from kd_mm.hosts.versions import import_fault
from kd_mm.hosts.zoo import package_folder, zoo_config
from kd_mm.ops.problems import Problems
from kd_mm.registry import accepted_arguments
from kd_mm.teachers.spec import RANDOM

#: Name of the hook in a config.
HOOK = 'kd_mm.DistillHook'
#: Steps of an epoch where the length of training is needed, only epochs are known and the data set was not opened:
#: about COCO's at 16 images a step.
ASSUMED_EPOCH = 7000


def read_config(path: str, options: Optional[Dict[str, Any]] = None) -> Config:
    """A config file (or an installed one, ``mmdet::...``) with the options of a command line applied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no config, or for no host of kd_mm, or has no model, or an option leads nowhere.
    """
    path = os.fspath(path)
    file = str(zoo_config(path)) if '::' in path else os.path.expanduser(path)
    if not os.path.isfile(file):
        raise FileNotFoundError(no_such_config(path))
    cfg = read_file(file, f'the config {path}')
    apply_options(cfg, options or {})
    if not cfg.get('model') or 'type' not in cfg.model:
        raise ValueError(f'{path} has no `model` with a `type`')
    problem = no_host(cfg) or unusable_host(cfg)
    if problem is not None:
        raise ValueError(f'{path} {problem}')
    return cfg


def no_host(cfg: Config) -> Optional[str]:
    """What is wrong with a config that is for no host, as the end of a sentence; None for one that is."""
    if host_of_config(cfg) is not None:
        return None
    return (f'is for no host of kd_mm: default_scope={cfg.get("default_scope")!r}, and '
            f'model.type={type_name(cfg.get("model") or {})!r} is no class of theirs. Hosts are {", ".join(scopes())} '
            'and what builds on them: inherit from a config of one, such as '
            "'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py', set default_scope, or add an entry for your own package "
            '(docs/hosts.md)')


def unusable_host(cfg: Config) -> Optional[str]:
    """Why the host of a config cannot be imported, and the mend, as the end of a sentence; None where it can.

    Without this nothing of its scope is found, neither the model nor our hook, and a registry does not say why.
    """
    found = host_of_config(cfg)
    if found is None or not installed(found.host.package):
        return None
    fault = import_fault(found.host.package)
    if fault is None:
        return None
    return f'needs {found.host.package}, which is installed and cannot be imported: {fault[0]} -> {fault[1]}'


class Options(DictAction):
    """``--cfg-options KEY=VALUE ...`` of a command line; a word without ``=`` is told, not a traceback."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        wrong = next((word for word in values if not word.partition('=')[0] or '=' not in word), None)
        if wrong is not None:
            parser.error(f'{option_string}: {wrong!r} is no KEY=VALUE; write it without spaces around the =')
        super().__call__(parser, namespace, values, option_string)


def apply_options(cfg: Config, options: Dict[str, Any]) -> None:
    """Change a config as ``--cfg-options`` says.

    Raises:
        ValueError: an option leads nowhere; it is named, with what is there.
    """
    for option in options:
        _follow(cfg, option)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise ValueError(f'--cfg-options {" ".join(options)}: {error.args[0]}') from error


def _follow(cfg: Config, option: str) -> None:
    """Refuse an option with an index that its list does not have, or with a key below a plain value."""
    place: Any = cfg
    parts = option.split('.')
    for position, part in enumerate(parts):
        before, where = f'--cfg-options {option}=...', '.'.join(parts[:position])
        if isinstance(place, list):
            there = ', '.join(f'{index} ({type_name(item)})' for index, item in enumerate(place)) or 'none'
            if not part.isdigit() or int(part) >= len(place):
                raise ValueError(f'{before}: {part!r} is no index of the list {where}. It has: {there}')
            place = place[int(part)]
        elif hasattr(place, 'keys'):
            following = parts[position + 1:position + 2]
            if part not in place and following and following[0].isdigit():
                close = [key for key in place if isinstance(place.get(key), list)]
                raise ValueError(f'{before}: {where or "the config"} has no list {part!r} for the index {following[0]}.'
                                 f' Its lists: {", ".join(close) or "none"}')
            if part not in place:
                return  # a new key, as the host takes it
            place = place[part]
        else:
            raise ValueError(f'{before}: {where}={place!r} has nothing below it that an option could change. Give the '
                             f'whole value: {where}=...')


def hook_entries(cfg: Config) -> List[Dict[str, Any]]:
    """The entries of ``custom_hooks`` and ``default_hooks`` that are distillation hooks, or are meant as such."""
    return _entries_of(cfg, DistillHook)


def _entries_of(cfg: Config, wanted: type) -> List[Dict[str, Any]]:
    custom = cfg.get('custom_hooks') or []
    entries = [*([custom] if hasattr(custom, 'get') else custom), *(cfg.get('default_hooks') or {}).values()]
    return [entry for entry in entries if hasattr(entry, 'get') and _is_one(entry, scope_of_config(cfg), wanted)]


def _is_one(entry: Dict[str, Any], scope: Optional[str], wanted: type) -> bool:
    """Whether the Runner makes such a hook of an entry, or cannot although it is named like one."""
    found = _hook_class(entry, scope)
    if found is None:
        return type_name(entry) == wanted.__name__
    return isinstance(found, type) and issubclass(found, wanted)


def _hook_class(entry: Dict[str, Any], scope: Optional[str]) -> Any:
    """What the Runner finds for the ``type`` of a hook; None if nothing."""
    kind = entry.get('type')
    if not isinstance(kind, str):
        return kind
    try:
        with ENGINE_HOOKS.switch_scope_and_registry(scope) as registry:
            return registry.get(kind)
    except Exception:  # a registry raises anything for a path that leads nowhere
        return None


def type_name(entry: Any) -> str:
    """Class name of a hook entry, without its scope."""
    kind = entry.get('type') if hasattr(entry, 'get') else type(entry)
    return kind.split('.')[-1] if isinstance(kind, str) else getattr(kind, '__name__', str(kind))


def _hook_types(cfg: Config) -> List[str]:
    return [type_name(entry) for entry in cfg.get('custom_hooks') or []]


def dropped_hooks(cfg: Config) -> List[str]:
    """Hooks that a list of ``custom_hooks`` took away from the config it inherits from, as sentences.

    mmengine merges dicts and replaces lists, so a child that writes ``custom_hooks`` to add one hook loses those of
    its base.  Every file of the ``_base_`` chain is looked at, except those that a host ships: what they leave out is
    left out on purpose.
    """
    final = _hook_types(cfg)
    sentences: List[str] = []

    def visit(file: str, own: List[str]) -> None:
        for base in _base_files(file):
            inherited = _hook_types(_read_quietly(base))
            lost = [name for name in inherited if name not in own and name not in final]
            if lost:
                sentences.append(f'custom_hooks of {_short(file)} replaces the list of {_short(base)} and drops '
                                 f'{", ".join(lost)}: a list replaces the base\'s list. Repeat those entries beside '
                                 'the distillation hook, unless they are unwanted')
            if not _is_installed(base):
                visit(base, inherited)

    if cfg.filename and not _is_installed(cfg.filename):
        visit(cfg.filename, final)
    return list(dict.fromkeys(sentences))


def _base_files(file: str) -> List[str]:
    """Paths of the files that ``file`` names in ``_base_`` or imports under ``read_base()``."""
    if file.endswith('.py') and Config._is_lazy_import(file):
        return _imported_bases(file)
    names = [name for name in Config._get_base_files(file) if isinstance(name, str)]
    return [str(zoo_config(name)) if '::' in name else os.path.join(os.path.dirname(file), name)
            for name in names]


def _imported_bases(file: str) -> List[str]:
    """Paths of the files that a pure-Python config imports under ``read_base()``; found as mmengine finds them."""
    found = []
    for block in ast.parse(Path(file).read_text(encoding='utf-8')).body:
        for line in block.body if isinstance(block, ast.With) else ():
            if isinstance(line, ast.ImportFrom) and line.module:
                parts = line.module.split('.')
                if line.level:
                    root = Path(file).resolve().parents[line.level - 1]
                else:
                    root = Path(get_installed_path(parts.pop(0)))
                found.append(f'{root.joinpath(*parts)}.py')
    return found


def _read_quietly(file: str) -> Config:
    try:
        return Config.fromfile(file)
    except Exception:  # a fragment that is no config on its own has no hooks to lose
        return Config()


def _is_installed(file: str) -> bool:
    """Whether a host ships this file."""
    roots = [root for root in map(package_folder, scopes()) if root is not None]
    roots += [root.parent for root in roots if root.name == '.mim']  # pure-Python ones are in the package itself
    return any(root.resolve() in Path(file).resolve().parents for root in roots)


def _short(file: str) -> str:
    """A path for messages: below the ``configs`` folder of a host, else as it is seen from here."""
    for host in scopes():
        root = package_folder(host)
        if root is not None and (root / 'configs').resolve() in Path(file).resolve().parents:
            return f'{host}::{Path(file).resolve().relative_to((root / "configs").resolve())}'
    relative = os.path.relpath(file)
    return file if relative.startswith('..') else relative


def training_length(cfg: Config, samples: Optional[int] = None) -> Tuple[int, bool]:
    """Steps of the whole training, and whether that is a guess (an epoch's length depends on the data set).

    Args:
        cfg: the config.
        samples: of its training set, where it was opened.
    """
    loop = cfg.get('train_cfg') or {}
    if loop.get('max_iters'):
        return int(loop['max_iters']), False
    epochs = int(loop.get('max_epochs') or 0)
    if not samples:
        return epochs * ASSUMED_EPOCH, True
    return epochs * math.ceil(samples / ((cfg.get('train_dataloader') or {}).get('batch_size') or 1)), False


def unsupported(cfg: Config) -> List[str]:
    """Problems of the config that the hook would meet in the Runner, as sentences."""
    problems = []
    entries = hook_entries(cfg)
    for entry in entries:
        # The right name is not found where the host cannot import a package, which is told where the model is built.
        if entry.get('type') != HOOK and _hook_class(entry, scope_of_config(cfg)) is None:
            problems.append(f'custom_hooks: the Runner does not find type={entry.get("type")!r}; write type={HOOK!r}')
    if entries and hasattr(cfg.get('custom_hooks'), 'get'):
        problems.append('custom_hooks is one entry, and the Runner takes a list: custom_hooks = [dict(...)]')
    if len(entries) > 1:
        problems.append(listed(len(entries)))
    runner = cfg.get('runner_type')
    if entries and runner is not None:
        strategy = cfg.get('strategy')
        reason = refusal(type_name(dict(type=runner)), strategy and dict(strategy, type=type_name(strategy)))
        problems += [] if reason is None else [reason]
    wrapper = cfg.get('optim_wrapper') or {}
    if entries and (type_name(wrapper) == 'OptimWrapperDict' or (wrapper and 'optimizer' not in wrapper and any(
            hasattr(part, 'get') and 'optimizer' in part for part in wrapper.values()))):
        problems.append(SEVERAL_OPTIMIZERS)
    return list(dict.fromkeys(problems))


def unwritable(cfg: Config) -> List[str]:
    """Functions in a config, as a sentence: the Runner writes it as text into the work dir, and ends if it cannot."""
    found: List[str] = []

    def visit(value: Any, where: str) -> None:
        if isinstance(value, types.FunctionType):
            found.append(where)
        several = enumerate(value) if isinstance(value, (list, tuple)) else ()
        for key, item in value.items() if isinstance(value, dict) else several:
            visit(item, f'{where}.{key}' if where else str(key))

    visit(cfg.to_dict(), '')
    return [f'{", ".join(found)}: a lambda, or a function of the config itself, and mmengine writes every config as '
            'text into the work dir. Put it into a module and import it from there, or name it by its path '
            "('package.module.function')"] if found else []


def faults(cfg: Config) -> List[str]:
    """What is wrong with the distillation hook of a config, or with where it logs, and can be told before anything is
    built, as sentences.

    ``tools/train.py`` and ``tools/check_config.py`` both stop at it; a config without the hook has no faults.
    """
    problems = Problems()
    # The Runner opens the backends of its log before any hook is asked.
    for problem in [*unwritable(cfg), *unsupported(cfg), *missing(cfg.get('visualizer') or {})]:
        problems.add(problem)
    for entry in hook_entries(cfg):
        hook_arguments(entry, problems)
    drawing = _entries_of(cfg, DistillVisHook)
    for entry in drawing:
        try:
            _built_alone(DistillVisHook, entry)
        except ValueError as error:
            problems.add(error)
    if drawing and not hook_entries(cfg):
        problems.add(NOTHING_TO_DRAW)
    return problems.found


def lost_weights(cfg: Config) -> List[str]:
    """Files that the student starts from and that are not there, as a sentence each; no address is asked.

    Those are ``load_from``, ``model.pretrained`` and each ``init_cfg=dict(type='Pretrained', checkpoint=...)``.
    """
    found: List[Tuple[str, Any]] = [('load_from', cfg.get('load_from'))]

    def visit(part: Any, where: str) -> None:
        if isinstance(part, (list, tuple)):
            for index, item in enumerate(part):
                visit(item, f'{where}.{index}')
        elif hasattr(part, 'items'):
            if part.get('type') == 'Pretrained':
                found.append((f'{where}.checkpoint', part.get('checkpoint')))
            for key, value in part.items():
                if key == 'pretrained':
                    found.append((f'{where}.{key}', value))
                else:
                    visit(value, f'{where}.{key}')

    visit(cfg.get('model'), 'model')
    lost: Dict[str, List[str]] = {}
    for where, file in found:
        if isinstance(file, str) and file and '://' not in file and not os.path.isfile(os.path.expanduser(file)):
            lost.setdefault(file, []).append(where)
    return [f'{" and ".join(places)}={file!r}: no such file (looked at {os.path.abspath(os.path.expanduser(file))}). '
            'The student starts from these weights: mend the path, or '
            + ' and '.join(f'{place.removesuffix(".checkpoint")}=None' for place in places) + ' to start without them'
            for file, places in lost.items()]


def _built_alone(cls: Any, entry: Dict[str, Any]) -> None:
    accepted = accepted_arguments(cls)
    unknown = [key for key in entry if key not in ('type', 'priority', *accepted)]
    if unknown:
        raise ValueError(f'{cls.__name__} got unknown argument(s) {", ".join(map(repr, unknown))}. It accepts: '
                         f'{", ".join(accepted)}')
    cls(**{key: value for key, value in entry.items() if key not in ('type', 'priority')})


def hook_arguments(entry: Dict[str, Any], problems: Problems) -> Dict[str, Any]:
    """What :class:`~kd_mm.engine.distiller.Distiller` is given for a hook entry; wrong arguments become problems."""
    accepted = accepted_arguments(DistillHook)
    arguments = {key: value for key, value in entry.items() if key not in ('type', 'priority')}
    unknown = [key for key in arguments if key not in accepted]
    if unknown:
        problems.add(f'DistillHook got unknown argument(s) {", ".join(map(repr, unknown))}. It accepts: '
                     f'{", ".join(accepted)}')
    for required in ('teacher', 'losses'):
        arguments.setdefault(required, None)  # the distiller says what is missing
    known = {key: value for key, value in arguments.items() if key in accepted}
    for key, fault in argument_faults(known).items():
        problems.add(fault)
        known.pop(key)  # its default stands in, so that everything else is looked at too
    return DistillHook(**known).config


def all_random(arguments: Dict[str, Any]) -> Dict[str, Any]:
    """``arguments`` with random weights for every teacher."""
    if arguments.get('teachers') is None:
        return dict(arguments, teacher_ckpt=RANDOM)
    if not hasattr(arguments['teachers'], 'items'):  # building reports it
        return arguments
    return dict(arguments, teachers={name: dict(entry, teacher_ckpt=RANDOM) if hasattr(entry, 'items') else entry
                                     for name, entry in arguments['teachers'].items()})


def without_download(arguments: Dict[str, Any], folder: Optional[str] = None) -> Tuple[Dict[str, Any], Optional[str]]:
    """``arguments`` with teacher weights that are on this machine.

    Args:
        arguments: of the hook.
        folder: of the config.

    Returns:
        The arguments, and a sentence if the weights would have to be fetched; they are random then.
    """
    if arguments.get('teachers') is not None:
        if not hasattr(arguments['teachers'], 'items'):  # building reports it
            return arguments, None
        entries, notes = {}, []
        for name, entry in arguments['teachers'].items():
            found, note = without_download(dict(entry), folder) if hasattr(entry, 'get') else (entry, None)
            entries[name] = found
            notes.extend([note] if note else [])
        return dict(arguments, teachers=entries), '; '.join(notes) or None
    source = arguments.get('teacher_ckpt')
    if source is None and not isinstance(arguments.get('teacher'), nn.Module):
        try:
            path = load_config(arguments.get('teacher'), folder)[2]
        except Exception:  # a teacher's config may raise anything when it is read
            return arguments, None  # building reports it
        source = default_weights(path)
    if not isinstance(source, str) or urlparse(source).scheme not in ('http', 'https'):
        return arguments, None
    local = ckpt.cached(source)
    if local is not None:
        return dict(arguments, teacher_ckpt=local), None
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    return dict(arguments, teacher_ckpt=RANDOM), (
        'the weights of the teacher are not on this machine and nothing was fetched: random ones stand in. Training '
        f'fetches {source} into {folder}; or fetch it yourself and give its path as teacher_ckpt')
