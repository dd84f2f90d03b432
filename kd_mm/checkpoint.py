"""Reading checkpoints: safely, from files, URLs and the model zoo of the installed hosts."""

import difflib
import hashlib
import importlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple
from urllib.parse import urlparse

import numpy as np
import torch
import yaml
from mmengine.logging.history_buffer import HistoryBuffer

# Names under which older numpy versions pickled the two functions that scalars and arrays need.
_NUMPY_ALIASES = ('numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar',
                  'numpy.core.multiarray._reconstruct', 'numpy._core.multiarray._reconstruct')
_HASH_IN_NAME = re.compile(r'-([a-f0-9]{8,})\.')


def _statistic(owner: Any, name: str) -> Any:
    """What ``getattr`` may do in a checkpoint: name a statistic of mmengine's log buffer, which holds such references.

    Raises:
        ValueError: anything else.
    """
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(HistoryBuffer, name)
    raise ValueError(f'the checkpoint refers to {owner!r}.{name}, which safe loading does not allow')


def mmengine_globals() -> List[Any]:
    """The harmless classes that checkpoints written by mmengine and the OpenMMLab zoo hold besides tensors."""
    multiarray = importlib.import_module('numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray')
    functions = {'scalar': multiarray.scalar, '_reconstruct': multiarray._reconstruct}
    aliases = [(functions[name.rsplit('.', 1)[1]], name) for name in _NUMPY_ALIASES]
    dtypes = [type(np.dtype(name)) for name in ('float64', 'float32', 'float16', 'int64', 'int32', 'uint8', 'bool')]
    # The unpickler is given our narrow function under the name of the builtin, never the builtin itself.
    return [HistoryBuffer, np.ndarray, np.dtype, *aliases, *dtypes, (_statistic, 'builtins.getattr')]


def allow_mmengine_checkpoints() -> None:
    """Let torch >= 2.6 load mmengine checkpoints with safe loading on, in the host's own code too (resume, test).

    The list is additive and holds only plain data classes; nothing turns ``weights_only`` off.
    """
    if hasattr(torch.serialization, 'add_safe_globals'):
        torch.serialization.add_safe_globals(mmengine_globals())


def load_file(path: str) -> Dict[str, Any]:
    """Load a checkpoint from a local file on the CPU, with torch's safe loading.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, or holds objects that safe loading refuses.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no such checkpoint: {path} (looked at {os.path.abspath(path)})')
    allow_mmengine_checkpoints()
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        raise ValueError(f'{path} cannot be loaded as a checkpoint: {error}. If it holds other Python objects, save '
                         'its weights alone first: torch.save(dict(state_dict=...), path)') from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint


def state_dict_of(checkpoint: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """The weights of a checkpoint, without the ``module.`` that a wrapper may have left."""
    state = checkpoint.get('state_dict', checkpoint.get('model', checkpoint))
    prefix = 'module.'
    if state and all(key.startswith(prefix) for key in state):
        state = {key[len(prefix):]: value for key, value in state.items()}
    return state


def _cache_place(url: str, folder: Optional[str] = None) -> Tuple[str, Optional[str]]:
    """Where the file of a URL is kept, and the hash in its name."""
    name = os.path.basename(urlparse(url).path)
    match = _HASH_IN_NAME.search(name)
    folder = folder or os.path.join(torch.hub.get_dir(), 'checkpoints')
    return os.path.join(folder, name), match.group(1) if match else None


def cached(url: str, folder: Optional[str] = None) -> Optional[str]:
    """Path of an earlier, whole download of ``url``, or None; fetches nothing."""
    target, expected = _cache_place(url, folder)
    whole = os.path.isfile(target) and (expected is None or _sha256(target).startswith(expected))
    return target if whole else None


def download(url: str, folder: Optional[str] = None) -> str:
    """Fetch a checkpoint into torch's cache (once) and check it against the hash in its name.

    Zoo files end in ``-<first 8 digits of the sha256>.pth``; a name without a hash is taken as it is.

    Raises:
        ValueError: the file's hash is another one; the file is not kept.
    """
    target, expected = _cache_place(url, folder)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    earlier = cached(url, folder)
    if earlier is not None:
        return earlier
    if os.path.isfile(target):
        os.remove(target)  # a broken earlier download
    try:
        torch.hub.download_url_to_file(url, target, hash_prefix=expected, progress=True)
    except RuntimeError as error:
        raise ValueError(f'the file at {url} does not have the hash {expected} of its name: {error}. Download it '
                         'again, or give a file of your own with teacher_ckpt=') from error
    except OSError as error:
        raise ValueError(f'cannot download {url}: {error}. Download it elsewhere and give the path with '
                         'teacher_ckpt=') from error
    return target


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as stream:
        for block in iter(lambda: stream.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def load(source: str) -> Dict[str, Any]:
    """Load a checkpoint from a path or a URL (``http``, ``https``, ``file``)."""
    if urlparse(source).scheme in ('http', 'https', 'file'):
        source = download(source)
    return load_file(os.path.expanduser(source))


def package_folder(package: str) -> Optional[Path]:
    """The ``.mim`` folder of an installed host (``mmdet``, ``mmseg``, ...), or None.

    Found through the import system and not through the distribution's name, because the maintained forks have other
    distribution names than the package they install.
    """
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for root in (Path(place) / '.mim', Path(place).parent):
            if (root / 'configs').is_dir():
                return root
    return None


def zoo_config(name: str) -> Path:
    """Path of an installed config named ``package::folder/file.py``.

    Raises:
        FileNotFoundError: the host is not installed or has no such config; the nearest names are listed.
    """
    package, _, relative = name.partition('::')
    root = package_folder(package)
    if root is None:
        raise FileNotFoundError(f'{name}: {package} is not installed, or without its configs. Install it, or give the '
                                'path of a config file')
    path = root / 'configs' / (relative if relative.endswith('.py') else relative + '.py')
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob('*.py')) if path.parent.is_dir() else \
            sorted(p.name for p in (root / 'configs').iterdir() if p.is_dir())
        raise FileNotFoundError(f'{name}: no such config in the installed {package}. Closest: '
                                f'{", ".join(_closest(path.name, near))}')
    return path


def _closest(name: str, names: List[str]) -> List[str]:
    return difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:5]


def zoo_weights(config_path: str) -> Optional[str]:
    """URL of the published weights of an installed config, from the host's model index; None if there are none."""
    path = Path(config_path).resolve()
    parts = path.parts
    if 'configs' not in parts:
        return None
    at = len(parts) - 1 - parts[::-1].index('configs')
    relative = '/'.join(parts[at:])
    for index in list(path.parent.glob('metafile.y*ml')):
        content = yaml.safe_load(index.read_text())
        models = content.get('Models', []) if isinstance(content, dict) else content
        for model in models or []:
            if model.get('Config') == relative and model.get('Weights'):
                return model['Weights']
    return None
