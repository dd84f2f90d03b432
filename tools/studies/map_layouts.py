#!/usr/bin/env python3
"""Where a teacher's convolutions and samples run fast on a CPU: the measurements behind the numbers of ``teachers/``.

    OMP_NUM_THREADS=1 python tools/studies/map_layouts.py
    OMP_NUM_THREADS=1 python tools/studies/map_layouts.py --only wide queries --turns 9

One table for each rule, with times of the processor in milliseconds (the least of ``--turns``, each form in turn):

  packed   weights that are multiplied by a norm and laid out in every pass, beside such that are kept
           (``packed.CELLS``: cells of the output)
  wide     dense 3x3 convolutions with the channels innermost, weights kept, beside the usual layout with the way there
           and back (``maps.WIDE`` and ``maps.CELLS``: channels, and cells of the input)
  far      dilated convolutions of single channels in both layouts, the way included (``maps.FAR``: padding)
  turned   a map turned image by image, beside ``contiguous()``
  queries  samples of deformable attention, so many queries at a time, beside the host's function (``sampling.QUERIES``)

The rules are fixed numbers, so that a run gives the same on every machine; what they are on another one this tells.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kd_mm.teachers import maps, sampling  # noqa: E402

LAST = torch.channels_last


def best(forms: Dict[str, Callable[[], Any]], turns: int) -> Dict[str, float]:
    """The least milliseconds of each form."""
    found: Dict[str, List[float]] = {name: [] for name in forms}
    for _ in range(turns + 1):  # the first time makes kernels
        for name, form in forms.items():
            start = time.process_time()
            form()
            found[name].append(1e3 * (time.process_time() - start))
    return {name: min(times[1:]) for name, times in found.items()}


def row(words: str, times: Dict[str, float], first: str, second: str) -> None:
    cells = ', '.join(f'{name} {value:.2f}' for name, value in times.items())
    print(f'{words:44s} {cells}; {second} / {first} {times[second] / times[first]:.2f}', flush=True)


def convolve(layer: nn.Conv2d, images: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._convolution_pointwise(
        images, weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups, 'none', [], '')
    return result


def drawn(images: int, channels: int, height: int, width: int) -> Tensor:
    """A map with the channels innermost."""
    return torch.randn(images, channels, height, width).contiguous(memory_format=LAST)


def kept(layer: nn.Conv2d, images: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight, layer.padding, layer.stride, layer.dilation, layer.groups, list(images.shape))
    return result


def packed(turns: int) -> None:
    for inside, outside, kernel in ((256, 1024, 1), (1024, 256, 1), (256, 256, 3), (512, 512, 3)):
        layer, scale = nn.Conv2d(inside, outside, kernel, padding=kernel // 2), torch.rand(outside, 1, 1, 1)
        for height, width in ((16, 32), (32, 32), (32, 64), (64, 64), (64, 128)):
            images = drawn(1, inside, height, width)
            weight = kept(layer, images, layer.weight * scale)
            times = best({'each pass': lambda: convolve(layer, images, layer.weight * scale),  # noqa: B023
                          'kept': lambda: convolve(layer, images, weight)}, turns)  # noqa: B023
            row(f'{inside} to {outside}, {kernel}x{kernel}, {height * width} cells', times, 'each pass', 'kept')


def wide(turns: int) -> None:
    for channels in (512, 1024, 1536, 2048, 2560, 4096):
        for height, width in ((16, 32), (32, 32), (32, 64), (64, 64), (64, 128)):
            layer = nn.Conv2d(channels, 512, 3, padding=1)
            images = drawn(1, channels, height, width)
            weight = kept(layer, images, layer.weight)
            times = best({'innermost': lambda: convolve(layer, images, weight),  # noqa: B023
                          'usual': lambda: maps.to_innermost(convolve(  # noqa: B023
                              layer, maps.to_usual(images), layer.weight))}, turns)  # noqa: B023
            row(f'{channels} to 512, 3x3, {height * width} cells', times, 'innermost', 'usual')


def far(turns: int) -> None:
    for channels in (320, 512, 1024, 2048):
        for reach in (4, 6, 8, 12, 18, 36):
            layer = nn.Conv2d(channels, channels, 3, padding=reach, dilation=reach, groups=channels)
            images = drawn(1, channels, 64, 128)
            times = best({'innermost': lambda: convolve(layer, images, layer.weight),  # noqa: B023
                          'usual': lambda: maps.to_innermost(layer(maps.to_usual(images)))}, turns)  # noqa: B023
            row(f'{channels} single channels, padding {reach}', times, 'innermost', 'usual')


def turned(turns: int) -> None:
    for shape in ((2, 256, 64, 128), (2, 1024, 32, 64), (1, 4096, 32, 64)):
        innermost = drawn(*shape)
        usual = innermost.contiguous()
        words = ' x '.join(map(str, shape))
        row(f'{words} to usual', best({'contiguous': innermost.contiguous, 'turned': lambda: maps.to_usual(
            innermost)}, turns), 'contiguous', 'turned')  # noqa: B023
        row(f'{words} to innermost', best({'contiguous': lambda: usual.contiguous(  # noqa: B023
            memory_format=LAST), 'turned': lambda: maps.to_innermost(usual)}, turns), 'contiguous', 'turned')  # noqa: B023


def queries(turns: int) -> None:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch as host

    shapes = torch.tensor([(48, 84), (24, 42), (12, 21), (6, 11)])
    cells = int(shapes.prod(1).sum())
    for count in (cells, 300):
        given = (torch.randn(2, cells, 8, 32), shapes, torch.rand(2, count, 8, 4, 4, 2) * 1.2 - 0.1,
                 torch.rand(2, count, 8, 16).softmax(-1).view(2, count, 8, 4, 4))
        for size in (64, 128, 256, 512, 1024, 8192):
            sampling.QUERIES = size
            row(f'{count} queries, {size} at a time', best({
                'host': lambda: host(*given), 'bags': lambda: sampling.sampled(*given)}, turns),  # noqa: B023
                'host', 'bags')


STUDIES: Dict[str, Callable[[int], None]] = dict(packed=packed, wide=wide, far=far, turned=turned, queries=queries)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=tuple(STUDIES), default=list(STUDIES), help='default: all')
    parser.add_argument('--turns', type=int, default=5, help='measured turns. Default: 5')
    args = parser.parse_args(argv)
    if args.turns < 1:
        parser.error('--turns must be at least 1')
    print(f'{torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}')
    torch.manual_seed(0)
    with torch.no_grad():
        for name in args.only:
            print(f'\n{name}', flush=True)
            STUDIES[name](args.turns)
    return 0


if __name__ == '__main__':
    sys.exit(main())
