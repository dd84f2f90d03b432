"""The raw forward of a host model."""

import inspect
from contextlib import contextmanager
from typing import Any, Iterator, List, Sequence

from torch import Tensor, nn

from kd_mm.hosts.models import task_of
from kd_mm.hosts.swap import swapped

#: Heads that in evaluation predict at the places alone where they expect an object, for one image at a time, by a flag
#: of their own.  What they say everywhere, as in training, is what can be compared.
EVERYWHERE = ('GuidedAnchorHead', )


def forward_tensor(model: Any, inputs: Tensor, data_samples: Any, paths: Sequence[str] = ()) -> Any:
    """The raw forward of a host model: features, neck and heads; no losses, no label assignment.

    mmseg's leaves out the auxiliary heads, so they are called here when a path asks for one.
    """
    with _everywhere(model):
        return _forward_tensor(model, inputs, data_samples, paths)


@contextmanager
def _everywhere(model: Any) -> Iterator[None]:
    """The flag of heads of :data:`EVERYWHERE` is that of training, and not that of their parts."""
    found: List[Any] = [getattr(model, name, None) for name in ('bbox_head', 'rpn_head')]
    heads = [head for head in found
             if any(cls.__name__ in EVERYWHERE for cls in type(head).__mro__) and not head.training]
    for head in heads:
        head.training = True
    try:
        yield
    finally:
        for head in heads:
            head.training = False


def _forward_tensor(model: Any, inputs: Tensor, data_samples: Any, paths: Sequence[str]) -> Any:
    auxiliary = getattr(model, 'auxiliary_head', None)
    wanted = [path for path in paths if path.startswith('auxiliary_head')] if isinstance(auxiliary, nn.Module) else []
    if task_of(model) is None:
        return model(inputs)
    if paths and _predicts_boxes_twice(model) and not any(path.startswith('mask_head') for path in paths):
        return model.bbox_head.forward(model.extract_feat(inputs))
    if not wanted and _ends_with_points(getattr(model, 'decode_head', None)):
        # The point head refines single points of a loss or a prediction; mmseg's raw forward gives it maps, and fails.
        return model.decode_head[0].forward(model.extract_feat(inputs))
    if not wanted and _compares_with_texts(getattr(model, 'decode_head', None)):
        # mmseg's raw forward gives its head neither the picture nor the texts, and fails.
        seen = nn.functional.interpolate(inputs, scale_factor=model.encoder_resolution, mode='bilinear'
                                         ) if model.asymetric_input else inputs
        return model.decode_head.forward([inputs, model.image_encoder(seen), model.text_encoder()],
                                         model.decode_head.deep_supervision_idxs)
    if not wanted and task_of(model) == 'segmentation' and _reads_samples(getattr(model, 'decode_head', None)):
        # mmseg's raw forward leaves the samples out, which mask transformers need for the size of the images.
        return model.decode_head.forward(model.extract_feat(inputs), _with_size(data_samples, inputs))
    if not wanted:
        return model(inputs, data_samples, mode='tensor')
    features: List[Any] = []
    output = None
    if len(wanted) == len(paths):
        features.append(model.extract_feat(inputs))
    else:
        original = model.extract_feat

        def extract_feat(images: Tensor) -> Any:
            features.append(original(images))
            return features[-1]

        # The auxiliary heads read the features of this very pass; a second one would fire the other taps twice.
        with swapped(model, 'extract_feat', extract_feat):
            output = model(inputs, data_samples, mode='tensor')
    heads: Any = auxiliary if isinstance(auxiliary, nn.ModuleList) else [auxiliary]
    for head in heads:
        head.forward(features[-1])
    return output


def _ends_with_points(head: Any) -> bool:
    return isinstance(head, nn.ModuleList) and any(cls.__name__ == 'PointHead' for cls in type(head[-1]).__mro__)


def _compares_with_texts(head: Any) -> bool:
    """SAN: its head takes the picture, CLIP's features of a smaller one, and the classes as texts."""
    return isinstance(head, nn.Module) and 'deep_supervision_idxs' in inspect.signature(type(head).forward).parameters


def _reads_samples(head: Any) -> bool:
    return isinstance(head, nn.Module) and 'batch_data_samples' in inspect.signature(type(head).forward).parameters


def _with_size(data_samples: Any, inputs: Tensor) -> List[Any]:
    """New data samples with the size of the padded batch in their meta information; the host's stay as they are."""
    size = {'batch_input_shape': tuple(inputs.shape[-2:])}
    return [sample.new(metainfo={**sample.metainfo, **size}) for sample in data_samples]


def _predicts_boxes_twice(model: Any) -> bool:
    """Whether the raw forward of mmdet calls the box head once more, to give the mask head its instances.

    YOLACT, CondInst and their like; in training the box head runs once, and taps count the calls.
    """
    return (isinstance(getattr(model, 'mask_head', None), nn.Module) and not hasattr(model, 'roi_head')
            and isinstance(getattr(model, 'bbox_head', None), nn.Module))
