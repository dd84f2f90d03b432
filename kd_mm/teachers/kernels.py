"""Convolutions and linear layers by the processor's library (oneDNN), with what follows them as part of one operation.

torch has the library inside, and leaves it aside in places: convolutions of one cell with one thread, linear layers in
float32.  What is here has the same formulas; results differ in the last bits.
"""

from typing import Any, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from kd_mm.ops.modes import autocast_dtype
from kd_mm.teachers.maps import far, laid_out, to_innermost, to_usual, wide
from kd_mm.teachers.packed import Packing

#: A layer whose output can take an activation along.
Layer = Union[nn.Conv2d, nn.Linear]
#: Operation of the library that follows a layer, by class of the activation.
ACTIVATIONS = {nn.ReLU: 'relu', nn.SiLU: 'swish', nn.LeakyReLU: 'leaky_relu', nn.GELU: 'gelu'}
#: From how many rows on a linear layer goes through the library: measured as long at 8, 0.8 of the time at 32.
ROWS = 32


def available() -> bool:
    """Whether torch has the library, and nobody has switched it off."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def kind_of(images: Tensor, layer: Layer) -> Optional[torch.dtype]:
    """In which dtype the library runs a layer on these images; None where it does not.

    float32 as it is, and bfloat16 where that is the dtype of an autocast around.  Not one image without its batch.
    """
    if (images.device.type != 'cpu' or layer.weight.dtype != torch.float32 or not available()
            or images.dim() != 4 and not isinstance(layer, nn.Linear)):
        return None
    around = autocast_dtype('cpu')
    if around is None:
        return torch.float32 if images.dtype == torch.float32 else None
    has = around == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return around if has and images.dtype in (torch.float32, around) else None


def takes(layer: Layer) -> bool:
    """Whether the library has all options of a layer, and is fast with them."""
    return isinstance(layer, nn.Linear) or (
        layer.padding_mode == 'zeros' and not isinstance(layer.padding, str) and not far(layer))


def _words(activation: Optional[nn.Module]) -> Tuple[str, Any, str]:
    """What the library calls an activation, its numbers and its variant."""
    if activation is None:
        return 'none', [], ''
    scalars = [activation.negative_slope] if isinstance(activation, nn.LeakyReLU) else []
    return ACTIVATIONS[type(activation)], scalars, activation.approximate if isinstance(activation, nn.GELU) else ''


def apply(layer: Layer, images: Tensor, weight: Tensor, bias: Optional[Tensor],
          activation: Optional[nn.Module] = None) -> Tensor:
    """``activation(layer(images))`` with these weights instead of the layer's.

    Args:
        layer: gives the options; :func:`takes` and :func:`kind_of` must be met.
        images: (N, C, H, W), or (..., C) for a linear layer.
        weight, bias: in float32.
        activation: one of :data:`ACTIVATIONS`.
    """
    kind = kind_of(images, layer)
    images, weight = images.to(kind), weight.to(kind)
    bias = None if bias is None else bias.to(kind)
    if isinstance(layer, nn.Linear):
        return torch.ops.mkldnn._linear_pointwise(images, weight, bias, *_words(activation))
    turned = laid_out(images) and wide(layer, images)
    maps: Tensor = torch.ops.mkldnn._convolution_pointwise(
        to_usual(images) if turned else images, weight, bias, layer.padding, layer.stride, layer.dilation, layer.groups,
        *_words(activation))
    return to_innermost(maps) if turned else maps


def add_into(layer: nn.Conv2d, images: Tensor, weight: Tensor, bias: Optional[Tensor], other: Tensor,
             relu: bool) -> Tensor:
    """``other + layer(images)``, and its ReLU, written over ``other``: no new memory."""
    kind = kind_of(images, layer)
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        other, images.to(kind), weight.to(kind), None if bias is None else bias.to(kind), layer.padding, layer.stride,
        layer.dilation, layer.groups, 'add', 1.0, 'relu' if relu else None, [], None)


def linear(rows: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """``rows @ weight.T + bias``, by the library where that is faster; torch has it for lower precisions.

    Example:
        >>> import torch
        >>> linear(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(3))
        tensor([[2., 2., 2.]])
    """
    if rows.numel() < ROWS * rows.shape[-1] or not rows.is_contiguous() or autocast_dtype('cpu') is not None:
        return nn.functional.linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, 'none', [], '')


def direct(layer: Layer, original: Any, packing: Packing) -> Any:
    """The forward of a plain layer by the library, where that is faster than what torch takes.

    Args:
        layer: the layer.
        original: its own forward, for everything else.
        packing: keeps weights.
    """
    def forward(images: Tensor) -> Tensor:
        if kind_of(images, layer) != torch.float32 or not images.numel():
            return original(images)
        if isinstance(layer, nn.Linear):
            return linear(images, layer.weight, layer.bias)
        if not laid_out(images):
            return original(images)
        weight = packing.weight(layer, images, torch.float32, lambda: [layer.weight], lambda: layer.weight)
        return apply(layer, images, weight, layer.bias)

    return forward
