"""Random batches that stock models of the hosts accept, for checks and measurements without a dataset.

No host is imported before a batch for one of its models is asked for.
"""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.hosts import table
from kd_mm.ops.boxes import envelope

#: Where a class count is looked up, in this order: the last classifier of a model decides what its labels are.
_COUNTS = (('roi_head.bbox_head', 'num_classes'), ('roi_head.mask_head', 'num_classes'),
           ('decode_head', 'num_classes'), ('panoptic_head', 'num_things_classes'), ('bbox_head', 'num_classes'),
           ('query_head', 'num_classes'), ('mask_head', 'num_classes'), ('rpn_head', 'num_classes'),
           ('bbox_head_refine', 'num_classes'), ('bbox_head_init', 'num_classes'))  # MMRotate's, in several steps


def find_num_classes(model: nn.Module) -> int:
    """Number of classes that the labels of ``model`` may have, read from its heads (of a list, the last one).

    Raises:
        ValueError: no head tells it.
    """
    for path, attribute in _COUNTS:
        head = _lookup(_unwrap(model), path)
        count = getattr(head, attribute, None)
        if isinstance(count, int) and count > 0:
            return count
    raise ValueError(f'no head of {type(model).__name__} has a class count ('
                     + ', '.join(f'{path}.{attribute}' for path, attribute in _COUNTS) + '). Give num_classes')


def input_channels(model: nn.Module) -> int:
    """Channels of the pictures that ``model`` takes: 3 for colour, 1 for grey, any number of bands.

    The number of means of its data preprocessor where that has more than one; else what the first layer of its backbone
    wants, counted in the channels of a picture: a stem that folds 2 x 2 pixels into its channels wants four times them.
    3 where neither tells.
    """
    model = _unwrap(model)
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    if isinstance(mean, Tensor) and mean.numel() > 1:
        return mean.numel()
    root = next((module for name, module in model.named_modules() if name.split('.')[-1] == 'backbone'), model)
    layers: List[Any] = [module for module in root.modules() if _width(module)]
    if not layers:
        return 3
    # In the order of registration the first layer need not be the first that runs, hence the pass.
    first = _width(layers[0])
    for guess in dict.fromkeys((3, first)):
        found = _first_layer(root, layers, guess)
        if found is not None and guess * found[1] % found[0] == 0:
            return guess * found[1] // found[0]
    return first if layers[0].weight.dim() == 4 else 3


class _Seen(Exception):
    """Ends a forward pass at its first layer."""


def _width(module: nn.Module) -> int:
    """Input channels of a 2-d convolution or a linear layer; 0 for anything else."""
    weight = getattr(module, 'weight', None)
    width = getattr(module, 'in_channels', None) or getattr(module, 'in_features', None)
    return width if isinstance(width, int) and isinstance(weight, Tensor) and weight.dim() in (2, 4) else 0


def _first_layer(root: nn.Module, layers: Sequence[nn.Module], channels: int) -> Optional[Tuple[int, int]]:
    """Channels that the first of ``layers`` gets from a picture of ``channels``, and those that it wants."""
    seen: List[Tuple[int, int]] = []

    def look(module: Any, inputs: Tuple[Any, ...]) -> None:
        axis = 1 if module.weight.dim() == 4 else -1
        seen.append((inputs[0].shape[axis], _width(module)))
        raise _Seen

    weight: Any = layers[0].weight
    size = getattr(root, 'img_size', 64)
    flags = [(module, module.training) for module in root.modules()]
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        root.eval()  # a norm before the first layer would take statistics
        size = (size, size) if isinstance(size, int) else tuple(size)
        with torch.no_grad():
            root(torch.zeros(1, channels, *size, device=weight.device,
                             dtype=weight.dtype if weight.is_floating_point() else torch.float32))
    except Exception:  # models raise anything for a picture that they cannot take
        pass
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in flags:
            module.training = flag
    return seen[0] if seen else None


def synthetic_batch(model: nn.Module,
                    batch_size: int,
                    shape: Tuple[int, int],
                    seed: int = 0,
                    device: Any = 'cpu',
                    num_classes: Optional[int] = None,
                    masks: bool = False,
                    training: bool = False) -> Dict[str, Any]:
    """One random batch as the model's data preprocessor gets it from a dataset.

    The global random state is neither read nor changed.

    Args:
        model: of a host, an mmdet detector or an mmseg segmentor for example; it decides the form of the batch, the
            classes, and whether there are masks.
        batch_size: images, at least 1.
        shape: (H, W) of the images in pixels, at least 16 each.  Normalising and padding are the data preprocessor's:
            one with a fixed ``size`` (mmseg's crop size) pads up to it.
        seed: the same seed gives the same batch. Default 0.
        device: where the tensors live. Default 'cpu'.
        num_classes: labels are in [0, num_classes). Default: what the model's heads say; 0 where they say nothing and
            the host's entry makes samples of its own.
        masks: whether objects have masks also where the model does not ask for them. Default False: a head of boxes may
            stumble over them (RTMDet's assigner does).
        training: whether it is for a data preprocessor with ``training=True``, for which some hosts collate their
            batches in another form. Default False.

    Returns:
        ``dict(inputs=..., data_samples=...)``: N images (C, H, W), uint8, C of :func:`input_channels`, and N
        ``DetDataSample`` (1 to 4 boxes, their labels, bitmap masks where the model predicts masks) or
        ``SegDataSample`` (map with some pixels of 255); for training in the form of the host's entry (``batch``).

    Raises:
        ValueError: an unknown kind of model, no class count, or a bad size.

    Example::

        data = model.data_preprocessor(synthetic_batch(model, 2, (128, 128), training=True), True)
        losses = model(**data, mode='loss')
    """
    height, width = (int(side) for side in shape)
    if batch_size < 1 or height < 16 or width < 16:
        raise ValueError(f'batch_size={batch_size} must be at least 1 and shape={tuple(shape)} at least (16, 16)')
    model = _unwrap(model)
    host = table.host_of(model)
    if host is None or host.sample is None:
        raise ValueError(f'{type(model).__name__} is neither an mmdet detector nor an mmseg segmentor, nor of another '
                         f'host of the table ({", ".join(table.scopes())}), so it is not known what its data samples '
                         'look like. Give your own batch instead of a synthetic one')
    # What builds on no host need not have classes: a model of poses has joints, which its samples are made with.
    counted = host.sample in (det_sample, seg_sample) or host.parent is not None
    if num_classes is None:
        try:
            num_classes = find_num_classes(model)
        except ValueError:
            if counted:
                raise
    classes = int(num_classes or 0)
    generator = torch.Generator().manual_seed(seed)
    channels = input_channels(model)
    inputs = [torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator).to(device)
              for _ in range(batch_size)]
    samples = [host.sample(model, index, height, width, classes, generator).to(device) for index in range(batch_size)]
    for sample in samples if masks else ():
        found = getattr(sample, 'gt_instances', None)
        if found is not None and 'masks' not in found:
            found.masks = filled(getattr(found.bboxes, 'tensor', found.bboxes), height, width)
    if training and host.batch is not None:
        return host.batch(model, inputs, samples)
    return dict(inputs=inputs, data_samples=samples)


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside a DDP wrapper."""
    inner = getattr(model, 'module', None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, 'data_preprocessor') else model


def _lookup(root: Any, path: str) -> Any:
    """The module at ``path``, the last one where the path meets a list; None if there is none."""
    for name in path.split('.'):
        root = getattr(root, name, None)
        if isinstance(root, (nn.ModuleList, list, tuple)):
            root = root[-1] if len(root) else None
    return root


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """A random integer in [low, high]."""
    return int(torch.randint(low, high + 1, (1, ), generator=generator))


def _boxes(height: int, width: int, generator: torch.Generator) -> Tensor:
    """1 to 4 boxes (M, 4), whole pixels, a quarter to three quarters of each side."""
    boxes: List[List[int]] = []
    for _ in range(_integer(1, 4, generator)):
        box_w = _integer(width // 4, 3 * width // 4, generator)
        box_h = _integer(height // 4, 3 * height // 4, generator)
        x, y = _integer(0, width - box_w, generator), _integer(0, height - box_h, generator)
        boxes.append([x, y, x + box_w, y + box_h])
    return torch.tensor(boxes, dtype=torch.float32)


def _regions(labels: Sequence[int], height: int, width: int, generator: torch.Generator) -> Tensor:
    """A label map (1, H, W) of blocks, as a real one is piecewise constant, with one strip of 255."""
    rows, columns = min(8, height), min(8, width)
    coarse = torch.tensor(list(labels))[torch.randint(0, len(labels), (rows, columns), generator=generator)]
    # Integer indices, not interpolate: exact for every label and every size.
    seg = coarse[torch.arange(height) * rows // height][:, torch.arange(width) * columns // width]
    top = _integer(0, height - max(height // 16, 1), generator)
    seg[top:top + max(height // 16, 1)] = 255
    return seg[None].clone()


def det_sample(model: nn.Module, index: int, height: int, width: int, classes: int,
               generator: torch.Generator) -> Any:
    """A ``DetDataSample`` with what this detector's loss reads."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmengine.structures import InstanceData, PixelData

    boxes = _boxes(height, width, generator)
    labels = torch.randint(0, classes, (len(boxes), ), generator=generator)
    # A data preprocessor that knows box classes turns them into tensors; any other passes on what it gets.
    wrap = HorizontalBoxes if hasattr(model.data_preprocessor, 'boxtype2tensor') else torch.Tensor
    instances = InstanceData(bboxes=wrap(boxes.clone()), labels=labels)
    names = [name for name, _ in model.named_modules()]
    if getattr(model.data_preprocessor, 'pad_mask', False) or any(
            word in name for name in names for word in ('mask', 'panoptic', 'segm_head')):
        instances.masks = filled(boxes, height, width)

    sample = DetDataSample(metainfo=dict(
        img_id=index, img_path=f'synthetic/{index}.jpg', ori_shape=(height, width), img_shape=(height, width),
        scale_factor=(1.0, 1.0), flip=False, flip_direction=None))
    sample.gt_instances = instances
    sample.ignored_instances = InstanceData(bboxes=wrap(boxes.new_zeros(0, 4)), labels=labels.new_zeros(0))
    if hasattr(model, 'roi_head') and not getattr(model, 'with_rpn', True):
        # Fast R-CNN reads proposals from the data. The data preprocessor leaves them alone, hence a plain tensor.
        sample.proposals = InstanceData(bboxes=torch.cat([boxes, _boxes(height, width, generator)]))
    stuff = _stuff_labels(model)
    if stuff:
        sample.gt_sem_seg = PixelData(sem_seg=_regions(stuff, height, width, generator))
    return sample


def filled(boxes: Tensor, height: int, width: int) -> Any:
    """Bitmap masks of objects that fill their boxes; of rotated ones the upright boxes around them."""
    from mmdet.structures.mask import BitmapMasks
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, envelope(boxes).clamp(min=0).long().tolist()):
        mask[y1:y2, x1:x2] = 1
    return BitmapMasks(masks.cpu().numpy(), height, width)


def _stuff_labels(model: nn.Module) -> List[int]:
    """Labels of the semantic map of a panoptic or semantic-branch detector; empty if it reads none."""
    panoptic = _lookup(model, 'panoptic_head')
    stuff = getattr(panoptic, 'num_stuff_classes', None)
    if stuff:
        return list(range(panoptic.num_things_classes, panoptic.num_things_classes + stuff))
    for path in ('semantic_head', 'roi_head.semantic_head'):
        semantic = _lookup(model, path)
        if semantic is not None:
            return list(range(semantic.num_classes))
    return []


def seg_sample(model: nn.Module, index: int, height: int, width: int, classes: int,
               generator: torch.Generator) -> Any:
    """A ``SegDataSample`` with a label map, and an edge map for the heads that read one."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=dict(
        img_path=f'synthetic/{index}.png', seg_map_path=f'synthetic/{index}_labelTrainIds.png',
        ori_shape=(height, width), img_shape=(height, width), pad_shape=(height, width), scale_factor=(1.0, 1.0),
        flip=False, flip_direction=None, reduce_zero_label=False))
    seg = _regions(range(classes), height, width, generator)
    sample.gt_sem_seg = PixelData(data=seg)
    head = _lookup(model, 'decode_head')
    if any(cls.__name__ == 'PIDHead' for cls in type(head).__mro__):
        edge = torch.zeros_like(seg)
        edge[:, :, 1:] = (seg[:, :, 1:] != seg[:, :, :-1]).to(seg.dtype)
        sample.gt_edge_map = PixelData(data=edge)
    return sample
