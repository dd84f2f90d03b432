"""Where a file that a config names may lie: below the current folder, or beside the config."""

import os
from typing import Any, List, Optional, Tuple

from mmengine.config import Config

from kd_mm.hosts.packages import PackageError, explained, importing
from kd_mm.hosts.renamed import hint

#: Keys of a hook that name files.
KEYS = ('teacher', 'teacher_ckpt', 'config', 'repo')


def is_relative(path: Any) -> bool:
    """Whether this is the relative path of a local file, and no URL, installed config or absolute path.

    Example:
        >>> is_relative('teacher.py'), is_relative('mmdet::gfl/gfl_r50_fpn_1x_coco.py'), is_relative('https://x.org/a')
        (True, False, False)
    """
    if not isinstance(path, (str, os.PathLike)):
        return False
    text = os.fspath(path)
    return '::' not in text and '://' not in text and not os.path.isabs(os.path.expanduser(text))


def places(path: Any, folder: Optional[str]) -> List[str]:
    """Absolute paths at which a file is looked for, the first one first.

    Args:
        path: as it is written.
        folder: that of the config which names it; None if it is not known.
    """
    path = os.path.expanduser(os.fspath(path))
    tried = [os.path.abspath(path)]
    if folder is not None and is_relative(path):
        tried.append(os.path.abspath(os.path.join(folder, path)))
    return list(dict.fromkeys(tried))


def read_file(path: Any, owner: str) -> Config:
    """A config file of the hosts.

    Args:
        path: of a file that is there.
        owner: the config, for messages.

    Raises:
        FileNotFoundError: a file that it inherits from is not there; an old name of one of ours is told the new one.
        PackageError: a package that it imports is not installed, or cannot be imported.
        ValueError: it is no config.
    """
    try:
        return _callable_parts(Config.fromfile(os.fspath(path)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{owner}: {error}{hint(str(error))}') from error
    except ImportError as error:
        raise explained(error, owner) from error
    except Exception as error:  # the file is a program, and mmengine asserts what it does not like
        module = importing(error)
        if module is not None:
            raise PackageError(f'{owner} cannot be read: importing {module} fails: {type(error).__name__}: {error}'
                               ) from error
        raise ValueError(f'{owner} is no config that mmengine can read: {type(error).__name__}: {error}') from error


def _callable_parts(cfg: Config) -> Config:
    """The config, with the functions of its loaders as the Runner can call them; in place.

    Of a ``_base_ = 'mmyolo::...'`` mmengine notes the scope in each outermost dict with a ``type``.  Registries take
    that note off.  A collate function is called by the Runner with everything in its dict, and knows no ``_scope_``.
    """
    for name in ('train', 'val', 'test'):
        for loader in _dicts(cfg.get(f'{name}_dataloader')):
            for function in ('collate_fn', 'worker_init_fn'):
                for part in _dicts(loader.get(function)):
                    part.pop('_scope_', None)
    return cfg


def _dicts(value: Any) -> List[Any]:
    return [item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, dict)]


def find(path: Any, folder: Optional[str]) -> Tuple[Optional[str], str]:
    """The first of :func:`places` that exists (None if none does), and a sentence that says where it was found."""
    tried = places(path, folder)
    found = next((place for place in tried if os.path.exists(place)), None)
    where = 'the current folder' if found == tried[0] else 'the folder of the config'
    return found, f'{os.fspath(path)} is {found}, in {where}'


def settle(entry: Any, folder: Optional[str]) -> bool:
    """Make absolute what is found beside the config alone, in place; whether there was something.

    A config that is written elsewhere, into a work dir, must still find it.

    Args:
        entry: of a hook, with dicts and lists inside.
        folder: of the config.
    """
    found = False
    items = entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ()
    for key, value in list(items):
        tried = places(value, folder) if key in KEYS and is_relative(value) else []
        if len(tried) == 2 and not os.path.exists(tried[0]) and os.path.exists(tried[1]):
            entry[key], found = tried[1], True
        else:
            found = settle(value, folder) or found
    return found
