"""Reading checkpoints: safely, from files, URLs and the model zoo of the installed hosts."""

import hashlib
import importlib.util
import os
import re
import zipfile
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

# Names under which older numpy versions pickled the two functions that scalars and arrays need.
_NUMPY_ALIASES = ('numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar',
                  'numpy.core.multiarray._reconstruct', 'numpy._core.multiarray._reconstruct')
_HASH_IN_NAME = re.compile(r'-([a-f0-9]{8,})\.')


#: Functions that mmengine's objects keep in a checkpoint: statistics of a log buffer, the curve of a one-cycle rate.
_KEPT = {HistoryBuffer: ('min', 'max', 'mean', 'current'),
         OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear')}


def _function(owner: Any, name: str) -> Any:
    """What ``getattr`` may do in a checkpoint: name one of :data:`_KEPT`.

    Raises:
        ValueError: anything else.
    """
    if any(owner is kind and name in names for kind, names in _KEPT.items()):
        return getattr(owner, name)
    raise ValueError(f'the checkpoint refers to {owner!r}.{name}, which safe loading does not allow')


def mmengine_globals() -> List[Any]:
    """The harmless classes that checkpoints written by mmengine and the OpenMMLab zoo hold besides tensors."""
    multiarray = importlib.import_module('numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray')
    functions = {'scalar': multiarray.scalar, '_reconstruct': multiarray._reconstruct}
    aliases = [(functions[name.rsplit('.', 1)[1]], name) for name in _NUMPY_ALIASES]
    dtypes = [type(np.dtype(name)) for name in ('float64', 'float32', 'float16', 'int64', 'int32', 'uint8', 'bool')]
    # The unpickler is given our narrow function under the name of the builtin, never the builtin itself.
    return [*_KEPT, np.ndarray, np.dtype, *aliases, *dtypes, (_function, 'builtins.getattr')]


def allow_mmengine_checkpoints() -> None:
    """Let torch >= 2.6 load mmengine checkpoints with safe loading on, in the host's own code too (resume, test).

    The list is additive and holds only plain data classes; nothing turns ``weights_only`` off.
    """
    if hasattr(torch.serialization, 'add_safe_globals'):
        torch.serialization.add_safe_globals(mmengine_globals())


def load_file(path: Union[str, 'os.PathLike[str]']) -> Dict[str, Any]:
    """Load a checkpoint from a local file on the CPU, with torch's safe loading; ``.safetensors`` by their own package.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, or holds objects that safe loading refuses.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        inside = sorted(name for name in os.listdir(path) if name.endswith(('.pth', '.pt', '.safetensors')))
        raise FileNotFoundError(f'{path} is a folder, not a checkpoint. Give one file; '
                                + (f'it holds {_some(inside)}' if inside else 'it holds no .pth file'))
    if not os.path.isfile(path):
        kind = path.partition('://')[0] if '://' in path else None
        where = (f'{kind}:// names weights of backbones; give a path or an http(s) URL of the whole model' if kind else
                 f'looked at {os.path.abspath(path)}')
        raise FileNotFoundError(f'no such checkpoint: {path} ({where})')
    if path.lower().endswith('.safetensors'):
        return _load_safetensors(path)
    allow_mmengine_checkpoints()
    if _is_torchscript(path):
        raise ValueError(f'{path} cannot be loaded as a checkpoint: it is a TorchScript program, not weights. Save its '
                         f"weights alone: torch.save(dict(state_dict=torch.jit.load({path!r}).state_dict()), "
                         "'weights.pth'), and rename the keys if the program's modules have other names")
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        # torch's own text advises to turn safe loading off, so neither it nor its traceback is passed on.
        raise ValueError(f'{path} cannot be loaded as a checkpoint: {_why_not(path, error)}') from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint: save a dict of tensors, '
                         "torch.save(dict(state_dict=model.state_dict()), 'weights.pth')")
    return checkpoint


def _load_safetensors(path: str) -> Dict[str, Any]:
    try:
        library = importlib.import_module('safetensors.torch')
    except ImportError as error:
        raise ValueError(f'{path} cannot be loaded as a checkpoint: it needs the package safetensors, which is not '
                         'installed. Install it: pip install safetensors') from error
    try:
        return dict(state_dict=library.load_file(path, device='cpu'))
    except Exception as error:  # an error type of its own
        raise ValueError(f'{path} cannot be loaded as a checkpoint: the file is no safetensors file, broken or cut off '
                         f'({error}). Copy or download it again') from None


def _is_torchscript(path: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split('/')[1:] == ['constants.pkl'] for name in archive.namelist())


def _why_not(path: str, error: Exception) -> str:
    """What a file that torch cannot load is, and the mend."""
    text = str(error)
    with open(path, 'rb') as stream:
        start = stream.read(64)
    if not start:
        return 'the file is empty. Copy or download it again'
    if path.lower().endswith('.onnx'):
        return ('it is an exported ONNX graph, whose weights have other names. Give the checkpoint that it was '
                'exported from')
    if start[:2] == b'PK' and ('PytorchStreamReader' in text or not zipfile.is_zipfile(path)):
        return f'the file is broken or cut off ({text.split(". ")[0]}). Copy or download it again'
    found = re.search(r'Unsupported (?:global: GLOBAL|class) ([\w.]+)', text)
    if found or start[:2] == b'PK':
        name = found.group(1) if found else text.splitlines()[-1] if 'weights_only' not in text else 'of some class'
        return (f'it holds a whole pickled model or other Python objects ({name}), which could run any code. Save '
                'its weights alone, where the file was made: '
                "torch.save(dict(state_dict=model.state_dict()), 'weights.pth')")
    if start[:1] == b'\x80':
        return ('it is a plain pickle, not a file of torch.save. If you trust it, convert it: '
                f"torch.save(pickle.load(open({path!r}, 'rb')), 'weights.pth')")
    return f'it is no file of torch.save; it begins with {start[:40]!r}. Give a .pth file, or copy this one again'


def _some(names: List[str]) -> str:
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')


def weight_sets(checkpoint: Mapping[str, Any]) -> Dict[str, Dict[str, torch.Tensor]]:
    """Every set of named tensors in a checkpoint.

    Returns:
        Where the set lies (``'state_dict'``, ``'ema.module'``, ``''`` for the checkpoint itself) -> key -> tensor.
        First ``state_dict``, ``model`` and ``''``, then the others as the file has them. mmengine's ``ema_state_dict``
        is left out where there is a ``state_dict``: ``EMAHook`` has already put the average into the latter.
    """
    found = dict(_sets_in(checkpoint, '', 3))
    if 'state_dict' in found:
        found.pop('ema_state_dict', None)
    first = [name for name in ('state_dict', 'model', '') if name in found]
    return {name: found[name] for name in [*first, *(name for name in found if name not in first)]}


def _sets_in(content: Mapping[str, Any], where: str, depth: int) -> Iterator[Tuple[str, Dict[str, torch.Tensor]]]:
    # Zoo files of other projects hold arrays instead of tensors.
    tensors = OrderedDict(
        (key, torch.as_tensor(value) if isinstance(value, np.ndarray) else value) for key, value in content.items()
        if isinstance(key, str) and (isinstance(value, torch.Tensor) or key.endswith('_extra_state')
                                     or isinstance(value, np.ndarray) and value.dtype.kind in 'fiub'))
    if tensors:
        if hasattr(content, '_metadata'):
            tensors._metadata = content._metadata  # type: ignore[attr-defined]
        yield where, tensors
    for key, value in content.items():
        # What the hook saves for a resume is no teacher.
        if depth and isinstance(key, str) and isinstance(value, Mapping) and not (where == '' and key == 'kd_mm'):
            yield from _sets_in(value, f'{where}.{key}' if where else key, depth - 1)


def state_dict_of(checkpoint: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """The first set of weights of a checkpoint, without the ``module.`` that a wrapper may have left."""
    state = next(iter(weight_sets(checkpoint).values()), {})
    return strip(state, 'module.') if state and all(key.startswith('module.') for key in state) else state


def strip(state: Dict[str, torch.Tensor], prefix: str, add: str = '') -> Dict[str, torch.Tensor]:
    """The keys of ``state`` below ``prefix``, with ``add`` in place of it; so too the versions of its modules."""
    kept = OrderedDict((add + key[len(prefix):], value) for key, value in state.items() if key.startswith(prefix))
    versions = getattr(state, '_metadata', None)
    if versions is not None:
        kept._metadata = OrderedDict(  # type: ignore[attr-defined]
            ((add + f'{path}.'[len(prefix):] if path else add)[:-1], version) for path, version in versions.items()
            if not prefix or f'{path}.'.startswith(prefix))
    return kept


@dataclass
class Fit:
    """One way to read a file's weights for a model."""

    #: where the set lies in the checkpoint, the prefix that its keys lose, and the one that they get
    where: str
    prefix: str
    add: str
    #: keys that then have the name and shape of one of the model's
    fitting: int
    #: keys that then have the name of one of the model's
    named: int
    #: other ways that fit at least half as many
    rivals: List['Fit'] = field(default_factory=list)

    def name(self, with_place: bool) -> str:
        """In words."""
        parts = [f'the prefix {self.prefix!r}'] if self.prefix else []
        parts += [f'the model\'s {self.add[:-1]!r}'] if self.add else []
        parts += [f'its {self.where!r}' if self.where else 'the file itself'] if with_place else []
        return ' in '.join(parts) or 'the keys without a prefix'


def best_fit(own: Dict[str, Any], sets: Dict[str, Dict[str, torch.Tensor]]) -> Optional[Fit]:
    """The set of weights, and the common prefix to take off or to put on, with which most keys fit a model.

    Where several fit equally, the earlier set of :func:`weight_sets` is taken, of one set the keys as they are, then
    those below a prefix with ``teacher`` in it, then those that come first.

    Args:
        own: the model's state dict.
        sets: of :func:`weight_sets`.

    Returns:
        None when there is no set.
    """
    fits = []
    for order, (where, state) in enumerate(sets.items()):
        fitting: Counter = Counter()
        named: Counter = Counter({('', ''): 0})
        for left, right, added in ((state, own, False), (own, state, True)):
            for key in left:
                if key.endswith('num_batches_tracked'):
                    continue  # a scalar in every batch norm fits any other
                for at in [0, *(match.end() for match in re.finditer(r'\.', key))]:
                    if key[at:] in right and (at or not added):
                        way = ('', key[:at]) if added else (key[:at], '')
                        named[way] += 1
                        fitting[way] += _shape(left[key]) == _shape(right[key[at:]])
        for index, (prefix, add) in enumerate(named):
            rank = (-fitting[prefix, add], -named[prefix, add], order, bool(prefix or add), bool(add),
                    'teacher' not in prefix, index)
            fits.append((rank, Fit(where, prefix, add, fitting[prefix, add], named[prefix, add])))
    if not fits:
        return None
    fits.sort(key=lambda item: item[0])
    best = fits[0][1]
    best.rivals = [fit for _, fit in fits[1:] if fit.fitting and 2 * fit.fitting >= best.fitting]
    return best


def _shape(value: Any) -> Optional[Tuple[int, ...]]:
    shape = getattr(value, 'shape', None)
    return None if shape is None else tuple(shape)


def common_prefix(keys: List[str]) -> str:
    """The dotted prefix that all keys share, with its dot; empty if there is none."""
    shared = os.path.commonprefix(keys)
    return shared[:shared.rfind('.') + 1]


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


def load(source: Union[str, 'os.PathLike[str]']) -> Dict[str, Any]:
    """Load a checkpoint from a path or a URL (``http``, ``https``, ``file``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the source is no path, or the file no checkpoint.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f'teacher_ckpt={source!r} is a {type(source).__name__}: give the path or URL of one file as text, or '
            "teacher_ckpt='random' for no weights"
            + ('. Several teachers are given as teachers=dict(name=dict(teacher=..., teacher_ckpt=...))'
               if isinstance(source, (list, tuple, dict)) else ''))
    source = os.fspath(source)
    if not source.strip():
        raise ValueError(f'teacher_ckpt={source!r} is empty: give a path or URL, or leave teacher_ckpt out for the '
                         'published weights of an installed config')
    if urlparse(source).scheme in ('http', 'https', 'file'):
        source = download(source)
    return load_file(os.path.expanduser(source))
