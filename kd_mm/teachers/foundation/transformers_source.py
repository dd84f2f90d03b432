"""Vision backbones of transformers as teachers, from a local folder or a config."""

import inspect
import json
import os
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from torch import Tensor, nn

from kd_mm.hosts import checkpoint as ckpt
from kd_mm.hosts.files import find
from kd_mm.ops.checks import boolean
from kd_mm.ops.modes import preserved_random_state
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.foundation.maps import (
    indices_of,
    make_teacher,
    maps_of,
    need_file,
    options_of,
    package,
    pair_of,
    prefix_tokens,
    read_file,
)
from kd_mm.teachers.spec import TeacherSpec

#: Where a file of a model of pictures and text has the former.
_PICTURES = 'vision_model.'
#: Files of a folder that hold weights, the first that there is.
_WEIGHTS = ('model.safetensors', 'pytorch_model.bin')
#: First parts of keys that a backbone does not have, and the last norm of a model, by name.
_HEADS = ('classifier', 'pooler', 'head', 'cls_classifier', 'distillation_classifier')
_NORMS = ('layernorm', 'post_layernorm', 'norm', 'layer_norm')


class BackboneMaps(nn.Module):
    """The maps of an ``AutoBackbone``."""

    def __init__(self, model: Any, patch: Optional[Tuple[int, int]], name: str):
        super().__init__()
        self.model, self.patch, self.name = model, patch, name
        self.prefix = prefix_tokens(model)

    def take(self, model: Any) -> None:
        """Use this model, of the same config."""
        self.model = model

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        return maps_of(self.model(images).feature_maps, images, self.patch, self.prefix, self.name)


class HiddenMaps(nn.Module):
    """The maps of some blocks of an ``AutoModel``: its hidden states, without what stands before the patches."""

    def __init__(self, model: Any, patch: Optional[Tuple[int, int]], indices: Sequence[int], norm: bool, name: str):
        super().__init__()
        self.patch, self.indices, self.name, self.norm = patch, list(indices), name, norm
        self.prefix = prefix_tokens(model)
        self.take(model)
        accepted = inspect.signature(model.forward).parameters
        self._options = dict(interpolate_pos_encoding=True) if 'interpolate_pos_encoding' in accepted else {}

    def take(self, model: Any) -> None:
        """Use this model, of the same config."""
        self.model = model
        norms = [getattr(model, part) for part in _NORMS if isinstance(getattr(model, part, None), nn.Module)]
        self._norm = norms[:1] if self.norm else []  # in a list: it is part of the model already

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        states = self.model(images, output_hidden_states=True, **self._options).hidden_states
        blocks = states[1:]  # the first is what enters the first block
        chosen = [blocks[index] for index in self.indices]
        return maps_of([self._norm[0](state) if self._norm and state.dim() == 3 else state for state in chosen],
                       images, self.patch, self.prefix, self.name)


def transformers_backbone(spec: TeacherSpec, config: Any, out_indices: Any = None, norm: bool = True,
                          options: Any = None, preprocess: Optional[Mapping[str, Any]] = None) -> Teacher:
    """A vision backbone of transformers, ``dict(type='transformers', config='folder', out_indices=(5, 11))``.

    ``AutoBackbone`` where the model has one, else ``AutoModel`` with its hidden states as maps; of a model of pictures
    and text the part for pictures.

    Args:
        spec: what the config says besides.  Without ``teacher_ckpt`` the weights are those in the folder.
        config: a local folder with ``config.json``, that file, or a dict with ``model_type``.
        out_indices: blocks (stages of a pyramid) that become levels, from 0; negative from the end. Default: the last
            one.
        norm: whether hidden states go through the model's last norm. Default True.
        options: other entries of the config.
        preprocess: see :class:`kd_mm.teachers.plain.PlainTeacher`. Default: the mean and std of the folder's
            ``preprocessor_config.json``.

    Raises:
        ValueError: no such package, folder or model, no weights, or they do not fit.
    """
    library = package('transformers', 'transformers', 'transformers')
    indices = indices_of('teacher transformers', out_indices)
    cfg, name, folder = _config(library, spec, config, options_of('teacher transformers', options))
    owner = f'teacher transformers {name}'
    files = [os.path.join(folder, file) for file in _files(folder)] if folder else []
    if not files:
        need_file(spec, f'transformers {name}', 'A folder that save_pretrained has written holds config.json, '
                  'preprocessor_config.json and the weights')
    patch = pair_of(getattr(cfg, 'patch_size', None))
    with spec.drawn():
        backbone = _build(library, owner, cfg, indices, patch, norm, name)
    notes: List[str] = []
    if spec.wants_file:
        notes = _fill(library, spec, backbone, read_file(spec), spec.checkpoint)
    elif spec.checkpoint is None:
        state: Dict[str, Tensor] = {}
        for file in files:
            state.update(ckpt.state_dict_of(ckpt.load_file(file)))
        notes = _fill(library, spec, backbone, state, files[0])
    return make_teacher(spec, backbone, f'transformers {name}', preprocess, _own(owner, folder, preprocess), patch,
                        notes=notes)


def _fill(library: Any, spec: TeacherSpec, backbone: Any, state: Mapping[str, Tensor], source: Any) -> List[str]:
    """Load weights strictly, but for those of a classifier; the package itself converts the names of its files.

    Returns:
        Sentences for the log.

    Raises:
        ValueError: they do not fit.
    """
    model = backbone.model
    strict = boolean('teacher transformers', 'teacher_strict', spec.strict)
    pictures = {key[len(_PICTURES):]: value for key, value in state.items() if key.startswith(_PICTURES)}
    found: List[Tuple[Any, Dict[str, Any]]] = []
    talk = library.logging.get_verbosity()
    library.logging.set_verbosity(library.logging.CRITICAL)
    library.logging.disable_progress_bar()
    try:
        for candidate in (dict(state), *([pictures] if pictures else [])):
            with preserved_random_state():
                found.append(type(model).from_pretrained(None, config=model.config, state_dict=candidate,
                                                         output_loading_info=True, ignore_mismatched_sizes=True))
    except Exception as error:
        raise ValueError(f'teacher checkpoint {source} cannot be loaded: {type(error).__name__}: {error}') from error
    finally:
        library.logging.set_verbosity(talk)
        library.logging.enable_progress_bar()
    loaded, info = min(found, key=lambda pair: len(pair[1]['missing_keys']))
    missing, extra, shapes = (sorted(map(str, info[key])) for key in (
        'missing_keys', 'unexpected_keys', 'mismatched_keys'))
    heads = sorted({head for key in extra for head in _HEADS if f'.{head}.' in f'.{key}.'})
    extra = [key for key in extra if not any(f'.{head}.' in f'.{key}.' for head in heads)]
    faults = [f'{word} {len(keys)} keys {what} ({", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""})'
              for word, keys, what in (('leaves', missing, 'of the model unset'),
                                       ('has', extra, 'the model does not have'),
                                       ('has', shapes, 'of another shape')) if keys]
    if faults and (strict or len(missing) + len(shapes) >= len(model.state_dict())):
        raise ValueError(f'teacher checkpoint {source} {"; ".join(faults)}: wrong file for this config? If it is meant '
                         'so, set teacher_strict=False')
    backbone.take(loaded.float())
    if heads:
        faults.append(f'has weights of {", ".join(heads)} as well, which a backbone does not have: they are left out')
    return [f'teacher checkpoint {source} {fault}' for fault in faults]


def _config(library: Any, spec: TeacherSpec, config: Any, options: Mapping[str, Any]) -> Tuple[Any, str, Optional[str]]:
    """The config of the vision model, a name for messages, and its folder."""
    folder = None
    if isinstance(config, Mapping):
        entries = {**config, **options}
        if 'model_type' not in entries:
            raise ValueError("teacher transformers: a config that is a dict has a `model_type`, such as 'dinov2'")
        name = str(entries['model_type'])
        try:
            cfg = library.AutoConfig.for_model(**entries)
        except Exception as error:
            raise ValueError(f'teacher transformers {name}: {error}') from error
    else:
        path = find(config, spec.folder)[0] if isinstance(config, (str, os.PathLike)) else None
        if path is None:
            raise ValueError(
                f'teacher transformers: config={config!r} is no folder and no file here (a name of a hub would be '
                'downloaded, which kd_mm does not do). Download its config.json, preprocessor_config.json and weights '
                'yourself and give the folder')
        folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
        name = os.path.basename(os.path.normpath(folder))
        try:
            cfg = library.AutoConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:  # its own types, and what a broken file raises
            raise ValueError(f'teacher transformers {name}: {path} gives no config: {error}') from error
        for key, value in options.items():
            setattr(cfg, key, value)
    return getattr(cfg, 'vision_config', cfg), name, folder


def _files(folder: str) -> List[str]:
    """Names of the files with weights in a folder; of a large model several."""
    for name in _WEIGHTS:
        if os.path.isfile(os.path.join(folder, name)):
            return [name]
        index = os.path.join(folder, f'{name}.index.json')
        if os.path.isfile(index):
            with open(index) as stream:
                return sorted(set(json.load(stream)['weight_map'].values()))
    return []


def _build(library: Any, owner: str, cfg: Any, indices: Optional[Sequence[int]], patch: Optional[Tuple[int, int]],
           norm: bool, name: str) -> Any:
    """The network around its maps."""
    if type(cfg) in library.AutoBackbone._model_mapping:
        stages = [*getattr(cfg, 'stage_names', ())]
        first = int(stages[:1] == ['stem'])
        count = len(stages) - first
        chosen = _checked(owner, indices, count)
        entries = {key: value for key, value in cfg.to_dict().items() if key not in ('out_features', 'stage_names')}
        entries['out_indices'] = [index + first for index in chosen]
        try:
            model = library.AutoBackbone.from_config(type(cfg).from_dict(entries))
            return BackboneMaps(model, patch, f'transformers {name}')
        except Exception as error:
            raise ValueError(f'{owner} cannot be built: {type(error).__name__}: {error}') from error
    layers = getattr(cfg, 'num_hidden_layers', None)
    chosen = _checked(owner, indices, layers if isinstance(layers, int) else len(getattr(cfg, 'depths', ())))
    try:
        try:  # what pools tokens for a classifier is not in every file
            model = library.AutoModel.from_config(cfg, add_pooling_layer=False)
        except TypeError:
            model = library.AutoModel.from_config(cfg)
    except Exception as error:
        raise ValueError(f'{owner} cannot be built: {type(error).__name__}: {error}') from error
    return HiddenMaps(model, patch, chosen, norm, f'transformers {name}')


def _checked(owner: str, indices: Optional[Sequence[int]], count: int) -> List[int]:
    """Indices from 0, in order."""
    wanted = [-1] if indices is None else list(indices)
    if count and any(not -count <= index < count for index in wanted):
        raise ValueError(f'{owner}: out_indices={wanted} and the model has {count} blocks')
    return [index % count if count else index for index in wanted]


def _own(owner: str, folder: Optional[str], preprocess: Any) -> Dict[str, Any]:
    """Mean and std in units of 0..255, by the folder's preprocessor_config.json."""
    path = os.path.join(folder or '', 'preprocessor_config.json')
    if folder is None or not os.path.isfile(path):
        if isinstance(preprocess, Mapping) and {'mean', 'std'} <= set(preprocess):
            return dict(channels='rgb')
        raise ValueError(f'{owner}: there is no preprocessor_config.json that says how its pictures are normalised. '
                         'Give preprocess=dict(mean=[...], std=[...]), three numbers each in units of 0..255')
    with open(path) as stream:
        entries = json.load(stream)
    factor = 1.0 / entries.get('rescale_factor', 1 / 255) if entries.get('do_rescale', True) else 1.0
    found: Dict[str, Any] = dict(channels='rgb', mean=[0.0] * 3, std=[factor] * 3)
    if entries.get('do_normalize', True) and entries.get('image_mean') and entries.get('image_std'):
        found['mean'] = [factor * value for value in entries['image_mean']]
        found['std'] = [factor * value for value in entries['image_std']]
    return found
