"""Write the networks of a plain student as ONNX files."""

import copy
import inspect
import json
import os
import re
import sys
import tempfile
import warnings
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.hosts import deployed
from kd_mm.hosts.swap import swapped
from kd_mm.lab.models import random_batch
from kd_mm.lab.onnx_parts import SECOND, Network, Part, Rows, need, sliding_window, wanted_parts
from kd_mm.lab.onnx_run import Runtime, parity

#: Opset of the files: grid_sample needs 16, layer_norm 17; onnxruntime knows 17 since 1.13.
OPSET = 17
#: Least and largest that the exporter of torch and onnxruntime both know.
OPSETS = (11, 20)
#: Operations that every onnxruntime has.
PLAIN_DOMAINS = ('', 'ai.onnx', 'ai.onnx.ml')
#: What the exporter cannot write -> the mend.
MENDS = {'adaptive_avg_pool2d': 'Its bins must divide the map: PSPNet (1, 2, 3 and 6 bins, stride 8) needs sides that '
                                'are multiples of 48, by --size HEIGHT WIDTH'}
#: Least height and width; smaller ones leave nothing after the strides of a backbone.
LEAST = 16


def check_plain(model: nn.Module) -> None:
    """Raise a ValueError for a model of which anything is not its host's own."""
    for path, module in model.named_modules():
        where = f'{path or "the model"} ({type(module).__name__})'
        if type(module).__module__.split('.')[0] == 'kd_mm':
            raise ValueError(f'{where} is of kd_mm: a plain student has nothing of it')
        if 'forward' in vars(module):
            raise ValueError(f'{where} has another forward than its class: a plain student has its own')


def check_size(model: Any, size: Tuple[int, int]) -> None:
    """Raise a ValueError for a size that the model's preprocessing would pad."""
    divisor = getattr(getattr(model, 'data_preprocessor', None), 'pad_size_divisor', 1) or 1
    if any(side % divisor or side < LEAST for side in size):
        fitting = tuple(-(-max(side, LEAST) // divisor) * divisor for side in size)
        needed = f'at least {LEAST}' if divisor == 1 else (
            f'at least {LEAST} and multiples of {divisor}, to which the model pads its images '
            '(data_preprocessor.pad_size_divisor)')
        raise ValueError(f'--size {size[0]} {size[1]}: height and width must be {needed}. Take --size {fitting[0]} '
                         f'{fitting[1]}')
    window = sliding_window(model)
    if window is not None and tuple(size) != window:
        raise ValueError(f'--size {size[0]} {size[1]}: the model looks at its images through windows of {window[0]}x'
                         f'{window[1]} (test_cfg.mode slide, crop_size), which is the size of its network. Leave '
                         '--size out')


def export(model: nn.Module, out: str, size: Tuple[int, int], meta: Dict[str, Any],
           opset: int = OPSET) -> Tuple[List[Part], float]:
    """Write the graphs of a plain model, and see that onnxruntime computes what torch does.

    The branches of re-parametrised blocks are merged in the graphs, and the model stays as it is.

    Args:
        model: of the host, in evaluation, with its weights.
        out: file of the first graph; the others are named after it, ``student.bbox_head.onnx``. They are written aside
            and take their names when all of them are right: what had these names before is kept until then.
        size: height and width of the images.
        meta: written into the first file's metadata, as JSON.
        opset: of the files.

    Returns:
        the graphs, with files, names and forms, and what :func:`parity` gives.

    Raises:
        ValueError: a package is missing; the size does not fit; the model cannot be written, or computes something
            else there; the folder cannot be written.
    """
    parts = wanted_parts(model, out)
    check_plain(model)
    check_size(model, size)
    batch = random_batch(model, 1, size, training=False)
    images, samples = batch['inputs'], batch['data_samples']
    folder, files = os.path.dirname(os.path.abspath(out)), [part.file for part in parts]
    first, rest = parts[0], parts[1:]
    first.inputs, first.example = ['images'], (images, )
    merged = model
    if deployed.blocks_of(model):
        merged = copy.deepcopy(model)
        deployed.merge(merged)
    try:
        with tempfile.TemporaryDirectory(prefix='.export-', dir=folder) as aside:
            for part in parts:
                part.file = os.path.join(aside, os.path.basename(part.file))
            _write(Network(merged, first, samples), first, opset, meta)
            if rest:
                _see_rows(merged, rest, images, samples)
            for part in rest:
                part.inputs = [f'input_{index}' for index in range(len(part.example))]
                _write(Rows(merged.get_submodule(part.path), part), part, opset, {})
            gap = parity(model, Runtime(parts), samples)
            for name in os.listdir(aside):  # weights of 2 GiB and more lie beside their graph
                os.replace(os.path.join(aside, name), os.path.join(folder, name))
    except OSError as error:
        raise ValueError(f'{out} cannot be written: {error}. Give another name, or make room') from error
    for part, file in zip(parts, files):
        part.file = file
    return parts, gap


def _see_rows(model: Any, parts: Sequence[Part], images: Tensor, samples: Sequence[Any]) -> None:
    """Note what each part of a second stage is called with on an image: tensors by place, anything else by name."""
    settings = getattr(getattr(model, SECOND), 'test_cfg', None) or {}
    before = settings.get('score_thr')

    with ExitStack() as stack:
        for part in parts:
            module: Any = model.get_submodule(part.path)

            def look(*args: Any, own: Any = module.forward, part: Part = part, **kwargs: Any) -> Any:
                if not all(isinstance(value, Tensor) for value in args) or any(
                        isinstance(value, Tensor) for value in kwargs.values()):
                    raise ValueError(f'{part.path} takes more than pooled features, and is not known here. mmdeploy '
                                     'knows more second stages')
                part.example, part.options = args, kwargs
                return own(*args, **kwargs)

            stack.enter_context(swapped(module, 'forward', look))
        try:
            if before is not None:
                settings['score_thr'] = 0.  # a mask head runs for what was found only
            with torch.no_grad():
                model(images, samples, mode='predict')
        finally:
            if before is not None:
                settings['score_thr'] = before
    silent = [part.path for part in parts if not part.example]
    if silent:
        raise ValueError(f'{" and ".join(silent)} did not run on a random image: the model found nothing in it')


@contextmanager
def _unheard() -> Iterator[None]:
    """Nothing from the inside reaches the console: where torch's exporter fails, its C++ prints the whole graph."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    try:
        with open(os.devnull, 'wb') as nowhere:
            for stream in kept:
                os.dup2(nowhere.fileno(), stream)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, place in kept.items():
            os.dup2(place, stream)
            os.close(place)


def _write(network: nn.Module, part: Part, opset: int, meta: Dict[str, Any]) -> None:
    onnx, inputs = need('onnx'), part.example
    network.eval()  # the exporter puts back what it finds here, and the model below follows
    name = type(getattr(network, 'model', getattr(network, 'module', network))).__name__
    with torch.no_grad():
        expected = network(*inputs)
        part.outputs = [f'features_{index}' if index < part.features else f'output_{index - part.features}'
                        for index in range(len(expected))]
        dynamic = None if part.name == 'network' else {key: {0: 'rows'} for key in (*part.inputs, *part.outputs)}
        # The newer exporter of torch traces no deformable attention (torch 2.13: "data is not allocated yet").
        older: Dict[str, Any] = {'dynamo': False} if 'dynamo' in inspect.signature(torch.onnx.export).parameters else {}
        with warnings.catch_warnings(), _unheard():
            warnings.simplefilter('ignore')  # each size that becomes a constant; the comparison finds a wrong one
            try:
                torch.onnx.export(network, inputs, part.file, opset_version=opset, dynamic_axes=dynamic,
                                  input_names=part.inputs, output_names=part.outputs, **older)
            except OSError:
                raise
            except Exception as error:  # the exporter raises anything
                lines = [line for line in str(error).splitlines() if line.strip()] or ['no message']
                said = re.split(r' (?:Please feel free|\[Caused by)', lines[0])[0].rstrip('. ')
                mend = next((f'. {text}' for word, text in MENDS.items() if word in said), '')
                raise ValueError(f'{name} cannot be written as ONNX (opset {opset}), at {part.path}: '
                                 f'{type(error).__name__}: {said}{mend}') from error
    graph = onnx.load(part.file)
    foreign = sorted({f'{node.domain}::{node.op_type}' for node in graph.graph.node
                      if node.domain not in PLAIN_DOMAINS})
    if foreign:
        raise ValueError(f'{name} uses operations that plain ONNX does not have: {", ".join(foreign)}. mmdeploy brings '
                         'an onnxruntime with some of them')
    part.selects = any(node.op_type == 'TopK' for node in graph.graph.node)
    if meta:
        for key, value in meta.items():
            entry = graph.metadata_props.add()
            entry.key, entry.value = key, json.dumps(value)
        onnx.save(graph, part.file)
