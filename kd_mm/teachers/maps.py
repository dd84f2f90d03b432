"""Maps with the channels innermost on a CPU: which convolutions are slow with them, and how they are turned."""

import torch
from torch import Tensor, nn

#: How far (padding) a dilated convolution of single channels may look for the library's fast kernel.  Beyond, the usual
#: layout, with the way there and back, takes 0.7 to 0.9 of the time with 1024 and 2048 channels and 1.3 to 1.7 with 320
#: and 512 (padding 8 to 18), but 0.1 to 0.3 with any at 36; the branches of DeepLabV3+ have 12, 24 and 36 (``python
#: tools/studies/map_layouts.py --only far``).  The second number is for processors without AVX-512.
FAR = (6, 4)
#: Pixels of so many channels lie a multiple of 4096 bytes apart, which a processor's first cache keeps in the same few
#: places: dense 3x3 convolutions of 1024, 2048 and 4096 channels take 0.74 to 0.92 of the time in the usual layout, the
#: way there and back included, from 4096 cells on; of 512, 1536 and 2560 channels 1.0 to 1.15 (``python
#: tools/studies/map_layouts.py --only wide``).
WIDE = 1024
#: From how many cells of the input on they are turned: with so many it takes 0.88 to 1.0 of the time, with half of them
#: 1.0 to 1.2.
CELLS = 1024


def laid_out(images: Tensor) -> bool:
    """Whether the channels are innermost, without being a map of one cell or one channel, which is both."""
    return images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)


def far(layer: nn.Module) -> bool:
    """Whether a convolution is slow with the channels innermost: one channel at a time, with large holes.

    Example:
        >>> [far(nn.Conv2d(8, 8, 3, padding=p, dilation=p, groups=8)) for p in (1, 12)]
        [False, True]
    """
    return bool(
        isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels and max(layer.dilation) > 1
        and not isinstance(layer.padding, str)
        and max(layer.padding) > FAR['AVX512' not in torch.backends.cpu.get_cpu_capability()])


def wide(layer: nn.Module, images: Tensor) -> bool:
    """Whether a convolution is slow with the channels innermost: 3x3, of very many channels of the wrong number.

    Args:
        layer: any.
        images: (N, C, H, W), what it is applied to.

    Example:
        >>> [wide(nn.Conv2d(width, 8, 3), torch.empty(1, width, 32, 32)) for width in (512, 1024, 1536)]
        [False, True, False]
    """
    return bool(
        isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels % WIDE == 0
        and min(layer.kernel_size) > 1 and max(layer.stride) == 1 and max(layer.dilation) <= 4
        and images.shape[0] * images.shape[-2] * images.shape[-1] >= CELLS)


def to_usual(images: Tensor) -> Tensor:
    """A map (N, C, H, W) in the usual layout.

    On a CPU one with the channels innermost is turned image by image, as a matrix of cells and channels: torch does
    that in blocks, in a third of the time of ``contiguous()`` (``python tools/studies/map_layouts.py --only turned``).
    """
    if images.device.type != 'cpu' or images.is_contiguous() or not laid_out(images):
        return images.contiguous()
    turned = torch.empty_like(images, memory_format=torch.contiguous_format)
    for number in range(images.shape[0]):
        turned[number].flatten(1).copy_(images[number].permute(1, 2, 0).flatten(0, 1).t())
    return turned


def to_innermost(images: Tensor) -> Tensor:
    """A map (N, C, H, W) with the channels innermost; in the same way."""
    if images.device.type != 'cpu' or laid_out(images) or not images.is_contiguous():
        return images.contiguous(memory_format=torch.channels_last)
    turned = torch.empty_like(images, memory_format=torch.channels_last)
    for number in range(images.shape[0]):
        turned[number].permute(1, 2, 0).flatten(0, 1).copy_(images[number].flatten(1).t())
    return turned
