"""What an installed config of ours calls while it is read: a file that both styles of mmengine can inherit from.

mmengine has two styles and lets no config inherit from the other one: a text config names its base in ``_base_``, a
pure-Python one imports it under ``read_base()``, which refuses any file with ``_base_``.  A config without either
belongs to both.  ``tools/dev/ship_configs.py`` writes such files into wheels: where the repository's config says
``_base_ = ...``, the installed one calls :func:`inherit`, and :func:`merged` at its end.
"""

from pathlib import Path
from typing import Any, Dict, List, Union

from mmengine.config import Config

import kd_mm


def folder(relative: str) -> str:
    """The folder of an installed config, from its path below ``configs``."""
    return str(Path(kd_mm.__file__).resolve().parent / 'configs' / relative)


def inherit(bases: Union[str, List[str]], relative: str) -> Config:
    """What ``_base_ = bases`` gives to a config in the folder ``relative``."""
    names = [bases] if isinstance(bases, str) else bases
    paths = [name if '::' in name else str(Path(folder(relative), name)) for name in names]
    return Config.fromstring(f'_base_ = {paths!r}', '.py')


def merged(own: Dict[str, Any], base: Config) -> Dict[str, Any]:
    """The variables of a config merged into its base as ``_base_`` merges them."""
    base.merge_from_dict({key: value for key, value in own.items() if not key.startswith('_') and key != 'LazyObject'})
    return base.to_dict()


def live(path: str) -> Dict[str, Any]:
    """The content of a text config, read now: what the files of an editable installation call."""
    return Config.fromfile(path).to_dict()
