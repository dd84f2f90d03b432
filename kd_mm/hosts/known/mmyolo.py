"""MMYOLO 0.6: dense heads whose layers lie in ``head_module``, and fast loaders that collate labels into one tensor."""

from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor

from kd_mm.hosts.meaning import BOXES, DISTRIBUTIONS, OBJECTNESS
from kd_mm.hosts.picks import yolo_v5
from kd_mm.hosts.table import Host, register

#: Data preprocessors that take, in training, what ``yolov5_collate`` makes; the second one a list of pictures.
FAST = ('YOLOv5DetDataPreprocessor', 'PPYOLOEDetDataPreprocessor')


def preprocessor_is(model: Any, *names: str) -> bool:
    """Whether the model's data preprocessor is of one of these classes."""
    return any(cls.__name__ in names for cls in type(model.data_preprocessor).__mro__)


def packed(model: Any, inputs: Sequence[Tensor], samples: Sequence[Any]) -> Any:
    """Labels in one tensor (image, class, box), as ``yolov5_collate`` makes it; for other loaders the samples as they
    are."""
    if not preprocessor_is(model, *FAST):
        return samples
    rows = []
    for index, sample in enumerate(samples):
        boxes = sample.gt_instances.bboxes
        boxes = boxes.tensor if hasattr(boxes, 'tensor') else boxes
        labels = sample.gt_instances.labels[:, None]
        rows.append(torch.cat([torch.full_like(labels, index), labels, boxes], dim=1))
    return dict(bboxes_labels=torch.cat(rows), img_metas=[
        dict(batch_input_shape=tuple(image.shape[-2:])) for image in inputs])


def batch(model: Any, inputs: List[Tensor], samples: List[Any]) -> Dict[str, Any]:
    """A batch as the loader of the model's config collates it."""
    whole = preprocessor_is(model, FAST[0])
    return dict(inputs=torch.stack(inputs) if whole else inputs, data_samples=packed(model, inputs, samples))


register(Host(
    'mmyolo', parent='mmdet', index='mmyolo-open', versions=('0.6', '0.7'), batch=batch, packed=packed,
    logits={
        'RTMDetHead': (('head_module.rtm_cls.*', ), None),
        'YOLOXHead': (('head_module.multi_level_conv_cls.*', ), None),
        'YOLOv5Head': (('head_module.convs_pred.*', ), yolo_v5),
        'YOLOv6Head': (('head_module.cls_preds.*', ), None),
        'YOLOv7Head': (('head_module.main_convs_pred.*', ), yolo_v5),  # P6; the others as YOLOv5
        'YOLOv8Head': (('head_module.cls_preds.*', ), None),
    },
    boxes={'YOLOv6Head': ('head_module.reg_preds.*', ), 'YOLOv8Head': ('head_module.reg_preds.*', )},
    towers={
        'RTMDetHead': ('head_module.cls_convs', 'head_module.reg_convs'),
        'YOLOXHead': ('head_module.multi_level_cls_convs', 'head_module.multi_level_reg_convs'),
        'YOLOv6Head': ('head_module.cls_convs', 'head_module.reg_convs'),
        'YOLOv8Head': ('head_module.cls_preds', 'head_module.reg_preds'),
    },
    # All heads derive from it.
    fixed={'YOLOv5Head': 'its layers lie in head_module, whose rows of classes are not known here'},
    branches={
        'head_module.reg_preds': DISTRIBUTIONS, 'head_module.rtm_reg': BOXES,
        'head_module.multi_level_conv_reg': BOXES, 'head_module.multi_level_conv_obj': OBJECTNESS},
))
