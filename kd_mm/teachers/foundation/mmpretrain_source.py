"""Backbones of mmpretrain as teachers."""

from typing import Any, List, Mapping, Optional, Tuple

from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from kd_mm.hosts.models import _without_pretrained, load_config
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.foundation.maps import (
    fill,
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


class BackboneMaps(nn.Module):
    """The maps of a backbone of mmpretrain."""

    def __init__(self, model: Any, name: str):
        super().__init__()
        self.model, self.name = model, name
        self.patch = pair_of(getattr(model, 'patch_size', None))
        self.prefix = prefix_tokens(model)

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        found = self.model(images)
        maps = [found] if isinstance(found, Tensor) else list(found)
        return maps_of(maps, images, self.patch, self.prefix, self.name)


def mmpretrain_backbone(spec: TeacherSpec, config: Any, out_indices: Any = None, options: Any = None,
                        preprocess: Optional[Mapping[str, Any]] = None) -> Teacher:
    """The backbone of a config of mmpretrain, ``dict(type='mmpretrain', config='mmpretrain::dinov2/...py')``.

    Args:
        spec: what the config says besides.  ``teacher_ckpt`` names a file, of the whole model or of the backbone.
        config: path, ``mmpretrain::`` name or dict of a config with ``model.backbone``.
        out_indices: blocks (stages) that become levels. Default: those of the config.
        options: other entries of the backbone's config.
        preprocess: see :class:`kd_mm.teachers.plain.PlainTeacher`. Default: the config's ``data_preprocessor``.

    Raises:
        ValueError: no such package or config, no weights named, or they do not fit.
    """
    package('mmpretrain', 'mmpretrain', 'mmpretrain')
    indices, options = indices_of('teacher mmpretrain', out_indices), options_of('teacher mmpretrain', options)
    cfg, name, _ = load_config(config, spec.folder)
    owner = f'teacher mmpretrain {name}'
    content = cfg.model.get('backbone')
    if content is None:
        raise ValueError(f'{owner}: the config has no model.backbone')
    need_file(spec, f'mmpretrain {name}', 'The card of the config says where its weights are; download them yourself')
    entries = {**_without_pretrained(content), **options}
    if indices is not None:
        entries['out_indices'] = indices
    with spec.drawn(), DefaultScope.overwrite_default_scope('mmpretrain'):
        model = _build(owner, entries)
        if not spec.wants_file and hasattr(model, 'init_weights'):
            model.init_weights()
    notes: List[str] = fill(spec, model, read_file(spec), ('head', 'neck')) if spec.wants_file else []
    data: Any = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    own = dict(mean=list(data.get('mean') or [0.0] * 3), std=list(data.get('std') or [1.0] * 3),
               channels='rgb' if data.get('to_rgb') or data.get('bgr_to_rgb') else 'bgr')
    backbone = BackboneMaps(model, f'mmpretrain {name}')
    multiple: Optional[Tuple[int, int]] = None if not prefix_tokens(model) else backbone.patch
    return make_teacher(spec, backbone, f'mmpretrain {name}', preprocess, own, multiple, notes=notes)


def _build(owner: str, entries: Mapping[str, Any]) -> Any:
    """The backbone; of a vision transformer with maps, if it can give them."""
    try:
        try:
            return MODELS.build({'out_type': 'featmap', **entries})
        except TypeError as error:
            if 'out_type' not in str(error):
                raise
            return MODELS.build(dict(entries))
    except Exception as error:
        hint = ' (mmpretrain 1.2.0 does not work beside transformers 5)' if 'NoneType takes no' in str(error) else ''
        raise ValueError(f'{owner} cannot be built: {type(error).__name__}: {error}{hint}') from error


