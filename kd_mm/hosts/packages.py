"""Packages that parts of the hosts need and the hosts do not install: which one is missing, and how to get it.

A host says so late and in many ways: a failed ``custom_imports``, a name that no registry knows, an import in the first
training step.  Here it is said before anything is built, from the config.
"""

import importlib
import importlib.util
import re
import traceback
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from kd_mm.hosts.versions import index_name

#: Package -> how to get it.
INSTALL: Dict[str, str] = {
    'aim': 'pip install aim',
    'clearml': 'pip install clearml',
    'detectron2': 'pip install git+https://github.com/facebookresearch/detectron2.git',
    'dvclive': 'pip install dvclive',
    'ldm': 'pip install git+https://github.com/CompVis/stable-diffusion.git, with what requirements/optional.txt of '
           'mmsegmentation lists',
    'mlflow': 'pip install mlflow',
    'mmcls': 'pip install "mmcls>=1.0.0rc0" (older ones need mmcv 1; mmpretrain took its place)',
    'mmpretrain': 'pip install mmpretrain (beside the maintained forks: pip install onedl-mmpretrain)',
    'neptune': 'pip install neptune',
    'panopticapi': 'pip install git+https://github.com/cocodataset/panopticapi.git',
    'tensorboard': 'pip install tensorboard',
    'timm': 'pip install timm',
    'torchvision': 'pip install torchvision, of the version that belongs to the installed torch',
    'transformers': 'pip install "transformers<5"',
    'wandb': 'pip install wandb',
}
#: A ``type`` in a config -> the package that it needs.
OF_TYPES: Dict[str, str] = {
    'AimVisBackend': 'aim', 'BertModel': 'transformers', 'ClearMLVisBackend': 'clearml',
    'CocoPanopticMetric': 'panopticapi', 'DVCLiveVisBackend': 'dvclive', 'Detectron2Wrapper': 'detectron2',
    'LoadPanopticAnnotations': 'panopticapi', 'MLflowVisBackend': 'mlflow', 'NeptuneVisBackend': 'neptune',
    'TIMMBackbone': 'timm', 'TensorboardVisBackend': 'tensorboard', 'VPD': 'ldm', 'WandbVisBackend': 'wandb'}
#: A key that is set in a config -> the package that it needs when it runs (CrowdDet's RoI layer; an assigner).
OF_KEYS: Dict[str, str] = {'perm_repeat_gt_cfg': 'torchvision', 'use_torchvision': 'torchvision'}
#: A key that is set in a config -> how to do without its package.
WITHOUT: Dict[str, str] = {'use_torchvision': "; or use_torchvision=False, which takes mmcv's"}
#: Scope in front of a ``type`` -> the package that has it.
OF_SCOPES: Dict[str, str] = {'mmcls': 'mmpretrain', 'mmpretrain': 'mmpretrain'}
#: Parts of a config that a training uses.
PARTS = ('model', 'train_dataloader', 'val_dataloader', 'val_evaluator')


class PackageError(ImportError, ValueError):
    """A package is not installed, or cannot be imported; the message says what needs it and the mend.

    It is an error of the config as well, and is told like the others.
    """


def installed(package: str) -> bool:
    """Whether a package can be found; nothing is imported.

    Example:
        >>> installed('torch'), installed('no_such_package')
        (True, False)
    """
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def sentence(package: str, needs: str) -> str:
    """That something needs a package, and how to get it.

    Example:
        >>> sentence('timm', 'TIMMBackbone')
        'TIMMBackbone needs the package timm, which is not installed: pip install timm'
    """
    return (f'{needs} needs the package {package}, which is not installed: '
            f'{INSTALL.get(package, f"pip install {index_name(package)}")}')


def _needs(value: Any) -> Iterator[Tuple[str, str]]:
    """(package, what needs it) of a part of a config and of all that is below it."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _needs(item)
    if not hasattr(value, 'items'):
        return
    kind = value.get('type')
    if isinstance(kind, str):
        scope, _, name = kind.rpartition('.')
        if name in OF_TYPES:
            yield OF_TYPES[name], kind
        if scope.split('.')[0] in OF_SCOPES:
            yield OF_SCOPES[scope.split('.')[0]], kind
    for key, item in value.items():
        if key in OF_KEYS and item:
            yield OF_KEYS[key], f'{key} of {kind or "the config"}'
        yield from _needs(item)


def missing(value: Any) -> List[str]:
    """What a config, or a part of it, needs and is not installed, as sentences; one a package.

    Example:
        >>> missing(dict(type='RetinaNet', backbone=dict(type='no_scope.ResNet')))
        []
    """
    found: Dict[str, str] = {}
    for package, needs in _needs(value):
        if package not in found and not installed(package):
            found[package] = sentence(package, needs) + WITHOUT.get(needs.split()[0], '')
    return list(found.values())


def require(value: Any, owner: str) -> None:
    """Stop if a config needs what is not installed.

    Args:
        value: the config, or a part of it.
        owner: whose it is, for the message.

    Raises:
        PackageError: see :func:`missing`.
    """
    found = missing(value)
    if found:
        raise PackageError(f'{owner}: {"; ".join(found)}')


def explained(error: ImportError, owner: str) -> PackageError:
    """An error of reading a config in words: which package its ``custom_imports`` lack, or why one cannot be imported.

    Args:
        error: what mmengine raised.
        owner: the config.

    Returns:
        The error to raise instead.
    """
    base = re.match(r'(\w+) is not installed, please install', str(error))
    if base is not None:  # a file of its _base_ is in a package that is not there
        return PackageError(f'{owner} cannot be read: {sentence(base.group(1), "it")}')
    # mmengine says which modules, in quotes, and keeps the cause to itself.
    modules = [module for module in re.findall(r"'([A-Za-z_][\w.]*)'", str(error).split('sys.path')[0])
               if module not in ('imports', 'allow_failed_imports')]
    absent = _absent(module.split('.')[0] for module in modules)
    if not absent and getattr(error, 'name', None):
        absent = _absent([str(error.name).split('.')[0]])
    if absent:
        said = '; '.join(sentence(package, 'it') for package in sorted(absent))
        return PackageError(f'{owner} cannot be read: {said}')
    for module in modules:
        reason = _reason(module)
        if reason is not None:
            return PackageError(f'{owner} cannot be read: importing {module} fails: {reason}')
    return PackageError(f'{owner} cannot be read: {error}')


def importing(error: BaseException) -> Optional[str]:
    """Which module of ``custom_imports`` was being imported when an error was raised; None for another error.

    mmengine explains an ImportError alone, and packages raise anything when they meet versions that they do not know.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == 'import_modules_from_strings':
            return frame.f_locals.get('imp')
    return None


def lacking(error: Exception) -> Optional[str]:
    """How to get the package whose import failed, in a sentence; None where the error is about something else.

    Example:
        >>> lacking(ModuleNotFoundError("No module named 'no_such.part'", name='no_such.part'))
        'it needs the package no_such, which is not installed: pip install no_such'
        >>> lacking(ValueError('of something else'))
    """
    name = str(getattr(error, 'name', None) or '').split('.')[0] if isinstance(error, ModuleNotFoundError) else ''
    return sentence(name, 'it') if name and not installed(name) else None


def _absent(roots: Any) -> Set[str]:
    return {root for root in roots if not installed(root)}


def _reason(module: str) -> Optional[str]:
    """Why an installed module cannot be imported; None where it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # packages raise anything when they meet versions that they do not know
        return f'{type(error).__name__}: {error}'
    return None


def without_operation(text: str) -> str:
    """A sentence for an error of mmcv that has no operation for the device; '' for any other.

    Example:
        >>> without_operation('carafe_forward_impl: implementation for device cpu not found.')[:52]
        '. mmcv has no such operation for cpu: train on a GPU'
    """
    found = re.search(r'implementation for device (\w+) not found', text)
    if found is None:
        return ''
    device = found.group(1).split(':')[0]
    return (f'. mmcv has no such operation for {device}: ' + (
        'train on a GPU, with an mmcv that was compiled for it (FORCE_CUDA=1)' if device == 'cpu' else
        f'compile mmcv for {device}'))
