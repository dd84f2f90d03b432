"""Models of a local torch.hub repository as teachers."""

import os
from typing import Any, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.hosts.files import find
from kd_mm.hosts.taps import tensors_in
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.foundation.maps import (
    fill,
    indices_of,
    make_teacher,
    maps_of,
    need_file,
    options_of,
    pair_of,
    prefix_tokens,
    read_file,
)
from kd_mm.teachers.spec import TeacherSpec

_HEADS = ('head', 'fc', 'classifier', 'mask_token')


class HubMaps(nn.Module):
    """The maps of a model of a hub: ``get_intermediate_layers`` (of DINOv2 and DINOv3), else all that it gives."""

    def __init__(self, model: Any, indices: Optional[Sequence[int]], norm: bool, name: str):
        super().__init__()
        self.model, self.norm, self.name = model, norm, name
        self.patch = pair_of(getattr(model, 'patch_size', None) or getattr(
            getattr(model, 'patch_embed', None), 'patch_size', None))
        self.prefix = prefix_tokens(model)
        self.indices: Any = 1
        if indices is not None:
            blocks = len(getattr(model, 'blocks', ())) or getattr(model, 'n_blocks', 0)
            if blocks and any(not -blocks <= index < blocks for index in indices):
                raise ValueError(f'teacher {name}: out_indices={list(indices)} and the model has {blocks} blocks')
            self.indices = [index % blocks if blocks else index for index in indices]

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        if hasattr(self.model, 'get_intermediate_layers'):
            return tuple(self.model.get_intermediate_layers(images, n=self.indices, reshape=True, norm=self.norm))
        return maps_of(tensors_in(self.model(images)), images, self.patch, self.prefix, self.name)


def hub_backbone(spec: TeacherSpec, repo: str, name: str, out_indices: Any = None, norm: bool = True,
                 options: Any = None, preprocess: Optional[Mapping[str, Any]] = None) -> Teacher:
    """A model of a local folder with a ``hubconf.py``, ``dict(type='torch.hub', repo='dinov2', name='dinov2_vits14')``.

    Args:
        spec: what the config says besides.  ``teacher_ckpt`` names a file.
        repo: the folder; nothing is fetched.  Its code runs, so it should be one that you trust.
        name: of the entry point.
        out_indices: blocks that become levels. Default: the last one.
        norm: whether the model's last norm is applied to each level. Default True, that of DINOv2 [C].
        options: other arguments of the entry point.
        preprocess: see :class:`kd_mm.teachers.plain.PlainTeacher`; needed, as a hub says nothing of it.

    Raises:
        ValueError: no such folder or entry point, no weights named, or they do not fit.
    """
    owner = f'teacher torch.hub {name}'
    indices, options = indices_of(owner, out_indices), options_of(owner, options)
    folder = find(repo, spec.folder)[0] if isinstance(repo, (str, os.PathLike)) else None
    if folder is None or not os.path.isfile(os.path.join(folder, 'hubconf.py')):
        raise ValueError(f'{owner}: repo={repo!r} is no folder here with a hubconf.py, and kd_mm downloads nothing. '
                         'Clone the repository and give its folder')
    need_file(spec, f'torch.hub {name}', 'The repository says where its weights are; download and save them yourself')
    if not isinstance(preprocess, Mapping) or not {'mean', 'std'} <= set(preprocess):
        raise ValueError(f'{owner}: a hub does not say how pictures are normalised. Give preprocess=dict(mean=[...], '
                         'std=[...]), three numbers each in units of 0..255')
    if options.get('pretrained'):
        raise ValueError(f'{owner}: pretrained=True downloads weights, which kd_mm does not do. Leave it out')
    with spec.drawn():
        model = _load(owner, folder, name, options)
    notes: List[str] = fill(spec, model, read_file(spec), _HEADS) if spec.wants_file else []
    backbone = HubMaps(model, indices, norm, f'torch.hub {name}')
    return make_teacher(spec, backbone, f'torch.hub {name}', preprocess, dict(channels='rgb'), backbone.patch,
                        notes=notes)


def _load(owner: str, folder: str, name: str, options: Mapping[str, Any]) -> Any:
    """The model of an entry point, without weights."""
    try:
        try:
            model = torch.hub.load(folder, name, source='local', **{'pretrained': False, **options})
        except TypeError as error:
            if 'pretrained' not in str(error):
                raise
            model = torch.hub.load(folder, name, source='local', **options)
    except Exception as error:  # its own code raises anything
        raise ValueError(f'{owner} cannot be built from {folder}: {type(error).__name__}: {error}') from error
    if not isinstance(model, nn.Module):
        raise ValueError(f'{owner} gives {type(model).__name__}, not an nn.Module')
    return model
