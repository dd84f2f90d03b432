"""Backbones of timm as teachers."""

import difflib
import sys
from typing import Any, List, Mapping, Optional, Sequence, Tuple

from torch import Tensor, nn

from kd_mm.teachers.base import Teacher
from kd_mm.teachers.foundation.maps import (
    fill,
    indices_of,
    make_teacher,
    need_file,
    options_of,
    package,
    pair_of,
    read_file,
)
from kd_mm.teachers.spec import TeacherSpec


class TimmMaps(nn.Module):
    """The maps of some blocks (stages) of a timm model.

    Args:
        model: the network, without its classifier.
        indices: which blocks, in order; None for the last one.
        norm: whether the model's last norm is applied to each of them.
    """

    def __init__(self, model: Any, indices: Optional[Sequence[int]], norm: bool):
        super().__init__()
        self.model, self.indices, self.norm = model, 1 if indices is None else list(indices), norm

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        return tuple(self.model.forward_intermediates(
            images, indices=self.indices, norm=self.norm, stop_early=True, output_fmt='NCHW', intermediates_only=True))


def timm_backbone(spec: TeacherSpec, name: str, out_indices: Any = None, norm: Optional[bool] = None,
                  options: Any = None, preprocess: Optional[Mapping[str, Any]] = None) -> Teacher:
    """A backbone of timm, ``dict(type='timm', name='vit_small_patch14_dinov2.lvd142m', out_indices=(5, 11))``.

    Tokens become maps without class and register tokens (timm's own ``num_prefix_tokens``); pictures are normalised by
    the mean and std of the model's own data config, and resized to the next multiple of its patches.

    Args:
        spec: what the config says besides.  ``teacher_ckpt`` names a file; the original files of a model are converted
            by timm's own function.
        name: of the model in timm.
        out_indices: blocks (stages of a pyramid) that become levels; negative from the end. Default: the last one.
        norm: whether the model's last norm is applied to each level. Default: for plain vision transformers, as DINOv2
            [C] and timm do for the last one.
        options: other arguments of ``timm.create_model``.
        preprocess: see :class:`kd_mm.teachers.plain.PlainTeacher`; replaces what the data config says.

    Raises:
        ValueError: no such package or model, no weights named, or they do not fit.
    """
    owner = f'teacher timm {name}'
    timm = package('timm', 'timm', 'timm')
    indices, options = indices_of(owner, out_indices), options_of(owner, options)
    if options.pop('pretrained', False) or not isinstance(name, str) or ':' in name:
        raise ValueError(f'{owner}: names of a hub and pretrained=True download weights, which kd_mm does not do. Give '
                         "the plain name of the model and teacher_ckpt='path' of its file")
    if name.partition('.')[0] not in timm.list_models():
        close = difflib.get_close_matches(name.partition('.')[0], timm.list_models(), n=3)
        raise ValueError(f'{owner}: timm {timm.__version__} has no model of this name'
                         + (f'. Closest: {", ".join(close)}' if close else ''))
    with spec.drawn():
        model = _create(timm, owner, name, options)
    need_file(spec, f'timm {name}', _where(model))
    if not hasattr(model, 'forward_intermediates'):
        raise ValueError(f'{owner}: {type(model).__name__} gives no features of its blocks (forward_intermediates). '
                         'Choose another model, or a newer timm')
    notes = _load(spec, model) if spec.wants_file else []
    plain = hasattr(model, 'num_prefix_tokens')
    backbone = TimmMaps(model, indices, plain if norm is None else bool(norm))
    _check_indices(owner, model, indices)
    config = timm.data.resolve_model_data_config(model)
    own = dict(mean=[255.0 * value for value in config['mean']], std=[255.0 * value for value in config['std']],
               channels='rgb')
    patches = getattr(model, 'patch_embed', None)
    patch = pair_of(getattr(patches, 'patch_size', None)) if not getattr(patches, 'dynamic_img_pad', False) else None
    fixed = pair_of(getattr(patches, 'img_size', None)) if getattr(patches, 'strict_img_size', False) else None
    return make_teacher(spec, backbone, f'timm {name}', preprocess, own, patch, fixed, notes)


def _create(timm: Any, owner: str, name: str, options: Mapping[str, Any]) -> Any:
    """The network; vision transformers take pictures of any size, if theirs can."""
    given = {'num_classes': 0, **options}
    try:
        try:
            return timm.create_model(name, pretrained=False, **{'dynamic_img_size': True, **given})
        except TypeError as error:
            if 'dynamic_img_size' not in str(error):
                raise
            return timm.create_model(name, pretrained=False, **given)
    except Exception as error:  # models raise anything for arguments that they cannot take
        raise ValueError(f'{owner} cannot be built with options={dict(options)}: {type(error).__name__}: {error}') \
            from error


def _where(model: Any) -> str:
    """Where the published weights of a model are, and their licence, as timm says."""
    config = getattr(model, 'pretrained_cfg', None) or {}
    place = config.get('hf_hub_id') or config.get('url')
    if not place:
        return 'timm names no published weights of this model'
    licence = config.get('license')
    return (f'timm names {place} as the published weights ({"licence " + licence if licence else "no licence named"}); '
            'download and save them yourself')


def _check_indices(owner: str, model: Any, indices: Optional[Sequence[int]]) -> None:
    blocks: Any = getattr(model, 'feature_info', None) or getattr(model, 'blocks', ())
    count = len(blocks)
    wrong = [index for index in indices or () if count and not -count <= index < count]
    if wrong:
        raise ValueError(f'{owner}: out_indices={list(indices or ())} and the model has {count} blocks')


def _load(spec: TeacherSpec, model: Any) -> List[str]:
    state = read_file(spec)
    own = model.state_dict()
    classifier = (getattr(model, 'pretrained_cfg', None) or {}).get('classifier') or ()
    heads = [classifier] if isinstance(classifier, str) else list(classifier)
    convert = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    notes: List[str] = []
    if convert is not None and not set(own) <= set(state):
        try:
            converted = convert(dict(state), model)
            state = converted[0] if isinstance(converted, tuple) else converted
            notes.append(f'teacher checkpoint {spec.checkpoint} has been converted by timm')
        except Exception as error:
            raise ValueError(f'teacher checkpoint {spec.checkpoint} is not one of {type(model).__name__}: timm cannot '
                             f'convert it ({type(error).__name__}: {error})') from error
    # What training alone uses, and what pools the tokens for the classifier.
    return notes + fill(spec, model, state, [*heads, 'mask_token'])
