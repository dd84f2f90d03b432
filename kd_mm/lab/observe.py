"""What every module of a model returns."""

import fnmatch
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn

from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.models import task_of
from kd_mm.hosts.taps import Tap
from kd_mm.hosts.tokens import TokenSizeError
from kd_mm.lab.models import random_batch
from kd_mm.ops.modes import eval_mode, preserved_random_state


@dataclass
class Output:
    """What one module returned in a forward pass, as a tap sees it."""

    path: str
    type: str
    calls: int
    shapes: List[Tuple[int, ...]]


def observe(model: nn.Module, shape: Tuple[int, int], data: Optional[Dict[str, Any]] = None) -> List[Output]:
    """Outputs of every sub-module in one forward pass (eval, no losses) on a random image, in model order.

    A tap on each module sees what a distillation tap there would see: a tensor an item of a tuple, one more for every
    further call, tokens as maps.  A model of no host has one more, ``'@output'``: what it returns as a whole.

    Args:
        model: the model.
        shape: (H, W) of the image.
        data: a batch of one, ``inputs`` and ``data_samples``. Default: what the model's data preprocessor makes of a
            random image.
    """
    device = next(model.parameters()).device
    alone = task_of(model) is None
    taps = [Tap(model, name) for name, _ in model.named_modules()
            if (name or alone) and not name.startswith('data_preprocessor')]
    with preserved_random_state(0), torch.no_grad(), eval_mode(model):
        data = random_batch(model, 1, shape, device, training=False) if data is None else data
        try:
            for tap in taps:
                tap.arm(tuple(data['inputs'].shape[-2:]))
            forward_tensor(model, data['inputs'], data['data_samples'], [tap.path for tap in taps])
            rows = []
            for tap in taps:
                owner = type(tap.owner).__name__
                try:
                    shapes = [tuple(tensor.shape) for tensor in tap.read()]
                except RuntimeError:  # it was not called, or returned no tensor
                    shapes = []
                except TokenSizeError as error:  # a loss there has to say tokens=
                    shapes = error.shapes
                rows.append(Output(tap.path or '@output', owner, tap.calls, shapes))
            return rows
        finally:
            for tap in taps:
                tap.clear()


def matches(path: str, pattern: Optional[str]) -> bool:
    """Whether a path contains ``pattern``, or fits it if it has wildcards."""
    if not pattern:
        return True
    return fnmatch.fnmatchcase(path, pattern) if any(letter in pattern for letter in '*?[') else pattern in path


def shape_text(shapes: Sequence[Sequence[int]]) -> str:
    """``1x256x32x32, 1x256x16x16``; equal neighbours are counted, long lists cut."""
    parts: List[List[Any]] = []
    for shape in shapes:
        text = 'x'.join(map(str, shape)) or 'scalar'
        if parts and parts[-1][0] == text:
            parts[-1][1] += 1
        else:
            parts.append([text, 1])
    texts = [text if count == 1 else f'{count} times {text}' for text, count in parts]
    return ', '.join(texts[:8]) + (f', ... ({len(shapes)} in all)' if len(texts) > 8 else '')
