"""What a model of a host predicts, in the frame of the batch that it was given and on features that were kept.

The hosts predict for the picture as it lies on the disk: they undo resizing, flips and padding by what a sample says
of them.  Labels belong to the batch, so the samples that are asked about here say that nothing was done.
"""

from contextlib import ExitStack
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.hosts.meaning import OF_QUERIES
from kd_mm.hosts.models import task_of
from kd_mm.hosts.swap import swapped
from kd_mm.ops.boxes import _tensor
from kd_mm.ops.classes import ClassPair, lookup
from kd_mm.ops.functional import resize
from kd_mm.types.labels import Detections, Pixels, Predictions
from kd_mm.types.records import Recorded, Seen

#: The method that gives a model's heads their features.
TRUNK = 'extract_feat'
#: Heads whose outputs can be used again where a loss has them run anyway.
HEADS = ('bbox_head', 'decode_head')
#: Heads that predict shares of classes for each pixel instead of logits.
SHARES = (*OF_QUERIES, 'SideAdapterCLIPHead')


def why_not(model: nn.Module) -> Optional[str]:
    """Why a model cannot be asked for labels; None if it can."""
    if callable(getattr(model, 'predict', None)):
        return None
    return (f'{type(model).__name__} predicts nothing: it has no method predict(inputs, data_samples). Take a detector '
            'or a segmentor, not a backbone')


def reads_text(model: nn.Module) -> bool:
    """Whether a model finds what a sample's ``text`` names, instead of classes of its own."""
    return isinstance(getattr(model, 'language_model', None), nn.Module)


def prediction_taps(model: nn.Module, wanted: Sequence[str] = ()) -> List[str]:
    """What to keep of a forward pass so that a prediction runs nothing again.

    Args:
        model: of a host, or any other (nothing can be kept).
        wanted: what else is tapped there: a head that runs because of it is kept, too.
    """
    if task_of(model) is None or not callable(getattr(model, TRUNK, None)):
        return []
    heads = [name for name in HEADS if _has_forward(getattr(model, name, None))
             and any(path == name or path.startswith(f'{name}.') for path in wanted)]
    return [TRUNK, *heads]


def _has_forward(head: Any) -> bool:
    return isinstance(head, nn.Module) and not isinstance(head, (nn.ModuleList, nn.ModuleDict, nn.Sequential))


def _full(value: Any) -> Any:
    """Tensors in full precision: boxes in half precision are off by pixels."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_full(item) for item in value)
    if isinstance(value, dict):
        return {key: _full(item) for key, item in value.items()}
    return value


@torch.no_grad()
def predict(model: Any, images: Tensor, samples: Any, kept: Mapping[str, Recorded], pair: ClassPair,
            shape: Tuple[int, int], shapes: Sequence[Tuple[int, int]], seen: Optional[Seen] = None,
            prompts: Sequence[str] = (), detector: bool = True) -> Predictions:
    """What a model predicts for a batch, by the student's classes.

    Args:
        model: with a method ``predict``, in eval mode.
        images: (N, C, H, W), as it wants them.
        samples: data samples of the host that belong to them.
        kept: what was recorded at :func:`prediction_taps`; what is missing runs again.
        pair: its classes and the student's.
        shape: (Hin, Win) of the student's batch.
        shapes: (h, w) of its images before padding.
        seen: how it sees that batch; None for as the student does.
        prompts: what an open-vocabulary detector is asked for: ``text`` of each sample, its entities one by one.
        detector: whether the samples are a detector's.

    Returns:
        Objects of classes that the student knows, or the best of these classes for each pixel.

    Raises:
        ValueError: what it gives is no prediction of a detector or segmentor.
    """
    size = (int(images.shape[-2]), int(images.shape[-1]))
    fresh = [_as_given(sample, size, prompts, detector) for sample in samples]
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(images.device.type, enabled=False))
        images = images.float()
        if TRUNK in kept:
            features = _full(kept[TRUNK].calls[-1].output)
            stack.enter_context(swapped(model, TRUNK, lambda *_: features))
            for name in HEADS:
                if name in kept:
                    _replay(stack, getattr(model, name), kept[name], features)
        if task_of(model) == 'segmentation':
            logits = model.encode_decode(images, [dict(sample.metainfo) for sample in fresh])
            return _pixels([shares(model, logits[index]) for index in range(len(logits))], pair, shape, seen)
        results = model.predict(images, fresh)
    if not isinstance(results, (list, tuple)) or len(results) != len(fresh):
        raise ValueError(f'{type(model).__name__}.predict gives {type(results).__name__}, not one sample an image')
    if all(hasattr(result, 'seg_logits') for result in results):  # a segmentor that is not mmseg's
        return _pixels([_share(result.seg_logits.data) for result in results], pair, shape, seen)
    return [_detections(model, result, pair, seen, own) for result, own in zip(results, shapes)]


def _replay(stack: ExitStack, head: Any, record: Recorded, features: Any) -> None:
    """Let a head give what it has given for the same features."""
    call, original = record.calls[-1], head.forward
    output = _full(call.output)

    def forward(given: Any, *args: Any, **kwargs: Any) -> Any:
        return output if given is features and not args and not kwargs else original(given, *args, **kwargs)

    if len(record.calls) == 1 and len(call.args) == 1 and not call.kwargs:
        stack.enter_context(swapped(head, 'forward', forward))


def _as_given(sample: Any, size: Tuple[int, int], prompts: Sequence[str], detector: bool) -> Any:
    """A sample whose picture on the disk is that of the batch."""
    meta: Dict[str, Any] = {key: value for key, value in sample.metainfo.items() if key not in (
        'flip', 'flip_direction', 'padding_size', 'img_padding_size', 'homography_matrix')}
    # A segmentor predicts for the padding, too; its head resizes to an img_shape of this very class.
    shape = tuple(meta.get('img_shape') or size)[:2] if detector else size
    meta.update(img_shape=shape if detector else torch.Size(shape), ori_shape=shape, pad_shape=size,
                batch_input_shape=size, scale_factor=(1.0, 1.0))
    if prompts:
        meta.update(text=tuple(prompts), custom_entities=True)
    new = type(sample)(metainfo=meta)
    if 'proposals' in sample:  # of a detector that takes those of others
        new.proposals = sample.proposals
    return new


def _detections(model: Any, result: Any, pair: ClassPair, seen: Optional[Seen], shape: Tuple[int, int]) -> Detections:
    """The objects of one image, of classes that the student knows."""
    found = getattr(result, 'pred_instances', None)
    if found is None or any(name not in found for name in ('bboxes', 'labels', 'scores')):
        raise ValueError(f'{type(model).__name__}.predict gives no pred_instances with bboxes, labels and scores')
    boxes, labels, scores = _tensor(found.bboxes).float(), found.labels.long(), found.scores.float()
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f'{type(model).__name__} predicts boxes of shape {tuple(boxes.shape)}; labels are boxes of '
                         'four numbers, x1 y1 x2 y2')
    classes = lookup(pair).to(labels.device)
    labels = torch.where(labels < len(classes), classes[labels.clamp(max=len(classes) - 1)], -torch.ones_like(labels))
    masks = found.masks if 'masks' in found else None
    if masks is not None:
        masks = torch.as_tensor(masks, device=boxes.device).bool()
    if seen is not None:
        down, along = seen.factors
        boxes = boxes / boxes.new_tensor([along, down, along, down])
    edge = boxes.new_tensor([shape[1], shape[0], shape[1], shape[0]])
    boxes = boxes.clamp(min=0).minimum(edge)
    if masks is not None and tuple(masks.shape[-2:]) != shape:
        masks = resize(masks[:, None].float(), shape)[:, 0] > 0.5 if len(masks) else masks.new_zeros(0, *shape)
    return Detections(boxes, labels, scores, masks)[labels >= 0]


def shares(model: Any, logits: Tensor) -> Tensor:
    """(K, H, W) scores of one image from what its segmentor gives, as the host predicts with it.

    Args:
        model: whose ``decode_head`` says what it gives.
        logits: (C, H, W); one channel for the second of two classes.
    """
    head = getattr(model, 'decode_head', None)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    if any(cls.__name__ in SHARES for cls in type(head).__mro__):
        logits = logits.float().clamp(min=0)
        return logits / logits.sum(dim=0, keepdim=True).clamp(min=1e-6)
    return _share(logits)


def _share(logits: Tensor) -> Tensor:
    logits = logits.float()
    if logits.shape[0] == 1:  # two classes, the second one's logit
        second = logits.sigmoid()
        return torch.cat([1 - second, second])
    return logits.softmax(dim=0)


def _pixels(shares: Sequence[Tensor], pair: ClassPair, shape: Tuple[int, int], seen: Optional[Seen]) -> Pixels:
    """The best class that the student knows, for every pixel of its batch."""
    (_, own), (count, theirs) = pair
    labels, scores = [], []
    for share in shares:
        if share.shape[0] < count:
            raise ValueError(f'a segmentor gives {share.shape[0]} classes, and it is said to have {count}')
        mapped = torch.stack([share[list(chosen) if isinstance(chosen, tuple) else [chosen]].sum(dim=0)
                              for chosen in theirs])
        if seen is not None:
            mapped = mapped[:, :seen.content[0], :seen.content[1]]
        if tuple(mapped.shape[-2:]) != shape:
            mapped = resize(mapped[None], shape)[0]
        best, index = mapped.max(dim=0)
        scores.append(best)
        labels.append(torch.as_tensor(own, device=index.device)[index])
    return Pixels(torch.stack(labels), torch.stack(scores))
