"""The networks of a plain student: from the prepared image to what a head returns.

What a head makes of its outputs (boxes, scores, NMS, the size of the picture) is the host's own post-processing and
stays outside of the files.  Most models are one graph.  A model with a second stage is one graph up to the proposal
head, which also gives the features, and one for each part of the second stage; which boxes are pooled lies between.

A graph is found by running the model's own ``predict`` until the head's ``forward`` has returned, so that nothing needs
to be known of what lies before it.
"""

import os
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Dict, List, Optional, Sequence, Tuple

from torch import Tensor, nn

from kd_mm.hosts.swap import swapped

PACKAGES = ('onnx', 'onnxruntime')
#: Children of a detector whose name ends like a head's and that are none in evaluation.
TRAINING_ONLY = ('auxiliary_head', )
#: What the first graph of a model with a second stage ends with, and the second stage.
PROPOSALS, SECOND = 'rpn_head', 'roi_head'
#: Parts of a second stage that pool features: they stand between the graphs.
POOLING = ('bbox_roi_extractor', 'mask_roi_extractor')


def need(package: str) -> Any:
    """An optional package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(f"ONNX files need the package {package} ({error}). Install both with: pip install onnx "
                         "onnxruntime, or pip install 'kd_mm[onnx]'") from error


@dataclass
class Part:
    """One graph.

    Attributes:
        name: ``'network'``, or the path below the second stage, such as ``'bbox_head'``.
        path: of the module whose ``forward`` the graph ends with.
        file: where it is written.
        inputs, outputs: names of its tensors.
        form: the nested lists that the module returns, with numbers in place of tensors.
        features: how many of the first outputs are features for a second stage.
        example, options: what it was traced with, tensors and others.
        selects: whether the graph picks the best of many, whose order may change with the last digit.
    """

    name: str
    path: str
    file: str = ''
    inputs: List[str] = field(default_factory=list)
    outputs: List[str] = field(default_factory=list)
    form: Any = None
    features: int = 0
    example: Tuple[Tensor, ...] = ()
    options: Dict[str, Any] = field(default_factory=dict)
    selects: bool = False

    @property
    def title(self) -> str:
        """The name of the file, for messages."""
        return os.path.basename(self.file)


class _Reached(Exception):
    """Ends a forward pass when a head has returned."""

    def __init__(self, arguments: Any, output: Any):
        super().__init__()
        self.arguments, self.output = arguments, output


def flatten(value: Any, found: List[Tensor]) -> Any:
    """The tensors of nested lists, appended to ``found``; the lists with their numbers instead.

    Example:
        >>> import torch
        >>> tensors = []
        >>> flatten(([torch.zeros(1)], None, torch.ones(2)), tensors), len(tensors)
        (([0], None, 1), 2)
    """
    if isinstance(value, Tensor):
        found.append(value)
        return len(found) - 1
    if isinstance(value, dict):
        return {key: flatten(part, found) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(flatten(part, found) for part in value) if isinstance(value, tuple) else [
            flatten(part, found) for part in value]
    return _Constant(value) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass
class _Constant:
    """An integer that a head returns beside its tensors, told apart from a tensor's number."""

    value: int


def restore(form: Any, tensors: Sequence[Tensor]) -> Any:
    """The nested lists that :func:`flatten` has taken apart.

    Example:
        >>> restore(([0], None, 1), ['a', 'b'])
        (['a'], None, 'b')
    """
    if isinstance(form, _Constant):
        return form.value
    if isinstance(form, int) and not isinstance(form, bool):
        return tensors[form]
    if isinstance(form, dict):
        return {key: restore(part, tensors) for key, part in form.items()}
    if isinstance(form, (list, tuple)):
        return type(form)(restore(part, tensors) for part in form)
    return form


def _weighty(module: Any) -> bool:
    return isinstance(module, nn.Module) and any(True for _ in module.parameters())


def find_parts(model: nn.Module) -> List[Part]:
    """The graphs that a model needs.

    Raises:
        ValueError: it has no head, or several of which it is not known how they hang together.
    """
    name = type(model).__name__
    heads = [child for child, module in model.named_children()
             if child.endswith('_head') and child not in TRAINING_ONLY and _weighty(module)]
    if heads == [PROPOSALS, SECOND] or heads == [SECOND, PROPOSALS]:
        return [Part('network', PROPOSALS, features=1), *_second_stage(model)]
    if len(heads) != 1 or heads == [SECOND]:
        known = f'one head, or {PROPOSALS} and {SECOND}'
        raise ValueError(f'{name} has {" and ".join(heads) or "no head"}: only models with {known} can be written as '
                         'ONNX. mmdeploy knows more of them')
    head: Any = getattr(model, heads[0])
    if isinstance(head, nn.ModuleList):  # each takes what the one before it predicts
        return [Part('network', f'{heads[0]}.{len(head) - 1}')]
    return [Part('network', heads[0])]


def wanted_parts(model: nn.Module, out: str) -> List[Part]:
    """The graphs that a model needs, with the files that they are written to.

    Args:
        model: of the host.
        out: file of the first graph; the others are named after it.

    Raises:
        ValueError: a package is missing, or the model cannot be written.
    """
    for package in PACKAGES:
        need(package)
    parts = find_parts(model)
    stem, suffix = os.path.splitext(out)
    for part in parts:
        part.file = out if part is parts[0] else f'{stem}.{part.name}{suffix}'
    return parts


def _second_stage(model: Any) -> List[Part]:
    parts = []
    for child, module in getattr(model, SECOND).named_children():
        if child in POOLING or not _weighty(module):
            continue
        names = [f'{child}.{index}' for index in range(len(module))] if isinstance(module, nn.ModuleList) else [child]
        parts += [Part(each, f'{SECOND}.{each}') for each in names]
    return parts


class Network(nn.Module):
    """A model from the prepared images to what a head returns, as flat tensors."""

    def __init__(self, model: nn.Module, part: Part, samples: Sequence[Any]):
        super().__init__()
        self.model, self.part, self.samples = model, part, samples

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        head: Any = self.model.get_submodule(self.part.path)
        own = head.forward

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _Reached(args, own(*args, **kwargs))

        with swapped(head, 'forward', stop):
            try:
                self.model(images, self.samples, mode='predict')
            except _Reached as reached:
                arguments, output = reached.arguments, reached.output
            else:
                raise ValueError(f'{type(self.model).__name__} predicts without its {self.part.path}')
        found: List[Tensor] = []
        features = [flatten(arguments[0], found)] if self.part.features else []
        if features:
            self.part.features = len(found)
        self.part.form = (*features, flatten(output, found))
        return tuple(found)


class Rows(nn.Module):
    """A part of a second stage on what was pooled, as flat tensors."""

    def __init__(self, module: Any, part: Part):
        super().__init__()
        self.module, self.part = module, part

    def forward(self, *inputs: Tensor) -> Tuple[Tensor, ...]:
        found: List[Tensor] = []
        self.part.form = (flatten(self.module(*inputs, **self.part.options), found), )
        return tuple(found)


def sliding_window(model: Any) -> Optional[Tuple[int, int]]:
    """Height and width of the windows of a segmentor that slides over its images; None for any other model."""
    settings: Any = getattr(model, 'test_cfg', None)
    if not hasattr(settings, 'get') or settings.get('mode') != 'slide':
        return None
    height, width = settings['crop_size']
    return int(height), int(width)
