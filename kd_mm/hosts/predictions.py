"""What data sets and predictions of the hosts hold, as arrays: boxes with classes and scores, label maps."""

from typing import Any, Dict, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from kd_mm.hosts.predict import shares
from kd_mm.ops.boxes import envelope


def true_objects(dataset: Any, index: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (G, 4) in pixels of the image as it lies on the disk, labels (G,) and whether each is ignored (G,).
    Rotated boxes and quadrilaterals give the upright boxes around them.

    They come from the annotations and not from the pipeline, which may or may not have scaled them.

    Raises:
        ValueError: the data set has no objects by its kind.
    """
    info: Dict[str, Any] = dataset.get_data_info(index)
    if 'instances' not in info:
        raise ValueError(f'{type(dataset).__name__} has no annotated objects (instances) for image {index}')
    known = [entry for entry in info['instances'] if 'bbox' in entry]
    return (_upright([entry['bbox'] for entry in known]),
            np.array([entry['bbox_label'] for entry in known], np.int64),
            np.array([bool(entry.get('ignore_flag', 0)) for entry in known], bool))


def _upright(boxes: Any) -> np.ndarray:
    """(M, 4); of rotated boxes and of quadrilaterals the upright boxes around them."""
    values = torch.as_tensor(boxes).detach().cpu().double()
    return envelope(values).numpy() if len(values) else np.zeros((0, 4))


def detected(sample: Any) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (D, 4) in pixels of the image on the disk, scores (D,) and labels (D,) of a prediction of mmdet;
    of rotated boxes the upright ones around them."""
    found = sample.pred_instances
    boxes = getattr(found.bboxes, 'tensor', found.bboxes)
    return (_upright(boxes), found.scores.detach().cpu().double().numpy(),
            found.labels.detach().cpu().numpy().astype(np.int64))


def true_labels(sample: Any) -> np.ndarray:
    """(H, W) label map of a sample of mmseg.

    Raises:
        ValueError: it has none.
    """
    if 'gt_sem_seg' not in sample:
        raise ValueError('the validation pipeline loads no label maps: it lacks LoadAnnotations, after Resize')
    return sample.gt_sem_seg.data[0].cpu().numpy()


def predicted_labels(sample: Any, model: nn.Module) -> Tuple[np.ndarray, Optional[np.ndarray]]:
    """Label map (H, W) of a prediction of mmseg, and the score of the label in each pixel; None where it has none."""
    labels = sample.pred_sem_seg.data[0].cpu().numpy()
    given: Optional[Tensor] = getattr(getattr(sample, 'seg_logits', None), 'data', None)
    if given is None:
        return labels, None
    values = shares(model, given.detach()).cpu().numpy()
    return labels, np.take_along_axis(values, labels[None].astype(np.int64), axis=0)[0]
