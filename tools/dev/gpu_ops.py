"""Which compiled operators of mmcv run on a device, and what stands in for those that do not."""

import importlib
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List

import torch
from torch import Tensor


def _nms(device: Any) -> Any:
    from mmcv.ops import nms
    return nms(torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 5.0]], device=device),
               torch.tensor([0.9, 0.8], device=device), 0.5)


def _roi_align(device: Any) -> Any:
    from mmcv.ops import roi_align
    return roi_align(torch.rand(1, 2, 8, 8, device=device), torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]], device=device),
                     2)


def _focal(device: Any) -> Any:
    from mmcv.ops import sigmoid_focal_loss
    return sigmoid_focal_loss(torch.rand(4, 3, device=device), torch.tensor([0, 1, 2, 3], device=device))


def _deform(device: Any) -> Any:
    from mmcv.ops import deform_conv2d
    return deform_conv2d(torch.rand(1, 2, 8, 8, device=device), torch.zeros(1, 18, 8, 8, device=device),
                         torch.rand(2, 2, 3, 3, device=device), 1, 1)


def _modulated(device: Any) -> Any:
    from mmcv.ops import modulated_deform_conv2d
    return modulated_deform_conv2d(
        torch.rand(1, 2, 8, 8, device=device), torch.zeros(1, 18, 8, 8, device=device),
        torch.ones(1, 9, 8, 8, device=device), torch.rand(2, 2, 3, 3, device=device), None, 1, 1)


def _attention(device: Any) -> Any:
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
    shapes = torch.tensor([[4, 4]], device=device)
    return MultiScaleDeformableAttnFunction.apply(
        torch.rand(1, 16, 2, 4, device=device), shapes, torch.tensor([0], device=device),
        torch.rand(1, 5, 2, 1, 2, 2, device=device), torch.rand(1, 5, 2, 1, 2, device=device), 64)


def _point(device: Any) -> Any:
    from mmcv.ops import point_sample
    return point_sample(torch.rand(1, 2, 8, 8, device=device), torch.rand(1, 3, 2, device=device))


#: operator -> a call on small tensors.
CALLS: Dict[str, Callable[[Any], Any]] = {
    'nms': _nms, 'roi_align': _roi_align, 'sigmoid_focal_loss': _focal, 'deform_conv2d': _deform,
    'modulated_deform_conv2d': _modulated, 'multi_scale_deform_attn': _attention, 'point_sample': _point}
#: operator -> what the host runs without it.
FALLBACKS = {
    'sigmoid_focal_loss': "mmdet's own formula in Python",
    'multi_scale_deform_attn': "mmcv's multi_scale_deformable_attn_pytorch, by itself on a CPU"}


def missing_ops(device: Any) -> Dict[str, str]:
    """The operators that do not run on this device, with the reason."""
    found = {}
    for name, call in CALLS.items():
        try:
            call(device)
        except Exception as error:  # not compiled, compiled for another device or another torch: anything
            found[name] = str(error).strip().split('\n')[0][:120] or type(error).__name__
    return found


def _focal_in_python(pred: Tensor, target: Tensor, weight: Any = None, gamma: float = 2.0, alpha: float = 0.25,
                     reduction: str = 'mean', avg_factor: Any = None) -> Tensor:
    module: Any = importlib.import_module('mmdet.models.losses.focal_loss')
    classes = pred.size(1)
    hot = torch.nn.functional.one_hot(target, num_classes=classes + 1)[:, :classes]
    found: Tensor = module.py_sigmoid_focal_loss(pred, hot, weight, gamma=gamma, alpha=alpha, reduction=reduction,
                                                 avg_factor=avg_factor)
    return found


@contextmanager
def fallbacks(missing: Dict[str, str]) -> Iterator[List[str]]:
    """Inside, what can stand in for a missing operator does; its names."""
    used: List[str] = []
    module: Any = importlib.import_module('mmdet.models.losses.focal_loss')
    kept = module.sigmoid_focal_loss
    if 'sigmoid_focal_loss' in missing:
        module.sigmoid_focal_loss = _focal_in_python
        used.append('sigmoid_focal_loss')
    try:
        yield used
    finally:
        module.sigmoid_focal_loss = kept
