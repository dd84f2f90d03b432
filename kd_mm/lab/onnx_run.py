"""A student's ONNX files in onnxruntime, with the host's own post-processing: does it find what torch finds?

The host's model is used for all that lies outside of the graphs.  Its ``extract_feat`` and the ``forward`` of its heads
are exchanged for onnxruntime while it predicts, and what its own trunk computes is overwritten with NaN, so that
nothing of it can get into the result.
"""

import copy
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from torch import Tensor, nn

from kd_mm.hosts.swap import swapped
from kd_mm.lab.configs import type_name
from kd_mm.lab.models import data_scope_of
from kd_mm.lab.onnx_parts import Network, Part, Rows, flatten, need, restore, sliding_window
from kd_mm.ops.words import count

#: Largest difference between onnxruntime and torch on random numbers, relative to the largest output.
TOLERANCE = 1e-3
#: How far boxes (pixels) and scores may be apart, which share of the pixels of masks and label maps must agree.
BOX, SCORE, AGREEMENT = 0.5, 1e-3, 0.999


class Runtime:
    """onnxruntime sessions on the processor, one a graph."""

    def __init__(self, parts: Sequence[Part]):
        library = need('onnxruntime')
        self.parts = list(parts)
        options = library.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self.sessions: Dict[str, Any] = {}
        for part in parts:
            try:
                self.sessions[part.name] = library.InferenceSession(part.file, options,
                                                                    providers=['CPUExecutionProvider'])
            except Exception as error:  # it has error classes of its own
                raise ValueError(f'onnxruntime {library.__version__} cannot load {part.title}: '
                                 f'{str(error).splitlines()[0]}') from error

    def __call__(self, part: Part, *inputs: Tensor) -> List[Tensor]:
        """The flat outputs of a graph.

        Raises:
            ValueError: images of another size, or another number of tensors.
        """
        session = self.sessions[part.name]
        wanted = [tuple(entry.shape) for entry in session.get_inputs()]
        shapes = [tuple(value.shape) for value in inputs]
        if len(shapes) != len(wanted) or any(
                len(shape) != len(other) or any(isinstance(side, int) and side != length
                                                for side, length in zip(other, shape))
                for shape, other in zip(shapes, wanted)):
            raise ValueError(f'{part.title} takes {_shapes(wanted)} and was given {_shapes(shapes)}')
        feed = {name: value.detach().cpu().numpy() for name, value in zip(part.inputs, inputs)}
        return [torch.from_numpy(value) for value in session.run(part.outputs, feed)]


def _shapes(shapes: Sequence[Sequence[Any]]) -> str:
    return ' and '.join('x'.join(map(str, shape)) for shape in shapes)


def parity(model: nn.Module, runtime: Runtime, samples: Sequence[Any], seed: int = 0) -> float:
    """Largest difference between onnxruntime and torch on random numbers, relative to an output's largest value.

    Raises:
        ValueError: it is more than :data:`TOLERANCE`, or something is not a number.
    """
    generator = torch.Generator().manual_seed(seed)
    worst = 0.
    for part in runtime.parts:
        first = part.name == 'network'
        # Another number of rows than in the trace shows a size that became a constant.
        inputs = tuple(torch.randn(value.shape if first else (len(value) + 3, *value.shape[1:]), generator=generator)
                       for value in part.example)
        own = Network(model, part, samples) if first else Rows(model.get_submodule(part.path), part)
        with torch.no_grad():
            expected = own.eval()(*inputs)
        for name, value, other in zip(part.outputs, expected, runtime(part, *inputs)):
            if value.is_floating_point() and not bool(value.isfinite().all()):
                height, width = part.example[0].shape[-2:]
                raise ValueError(f'{part.title}: {name} of torch itself is not finite' + (
                    f' on an image of {height}x{width}. Give another --size' if first else '')
                    + ', or look at the weights of the checkpoint')
            gap = difference(value, other, part.selects)
            if not gap <= TOLERANCE:
                raise ValueError(f'{part.title}: {name} differs from torch by {gap:.2g} of its largest value: the '
                                 'graph does not compute what the model does')
            worst = max(worst, gap)
    return worst


def difference(value: Tensor, other: Tensor, selects: bool = False) -> float:
    """Largest difference of two tensors, relative to the largest value of the first.

    Args:
        selects: the rows were picked as the best of many.  Two of almost the same score may change places, so the
            rows are compared in the order of their values, and one value in a hundred may be another.

    Example:
        >>> difference(torch.tensor([1., 2.]), torch.tensor([1., 2.002])) < 0.0011
        True
    """
    if value.shape != other.shape:
        return float('inf')
    if not value.numel():
        return 0.
    scale = value.abs().max().clamp(min=1e-6)
    if selects and value.dim() > 1:
        value, other = value.sort(dim=-2).values, other.sort(dim=-2).values
    gap = (value - other).abs().flatten()
    if selects:
        gap = gap.kthvalue(max(1, int(0.99 * len(gap)))).values
    return float(gap.max() / scale)


@contextmanager
def on_runtime(model: Any, runtime: Runtime) -> Iterator[None]:
    """Inside, the model predicts with onnxruntime."""
    first = runtime.parts[0]
    kept: List[List[Tensor]] = []
    own = model.extract_feat

    def extract(images: Tensor, *args: Any, **kwargs: Any) -> Any:
        kept[:] = [runtime(first, images)]
        if first.features:
            return restore(first.form, kept[0])[0]
        tensors: List[Tensor] = []
        form = flatten(own(images, *args, **kwargs), tensors)
        return restore(form, [torch.full_like(value, float('nan')) for value in tensors])

    def head(*args: Any, **kwargs: Any) -> Any:
        return restore(first.form, kept.pop())[-1]

    with ExitStack() as stack:
        stack.enter_context(swapped(model, 'extract_feat', extract))
        stack.enter_context(swapped(model.get_submodule(first.path), 'forward', head))
        for part in runtime.parts[1:]:
            def rows(*args: Tensor, part: Part = part, **kwargs: Any) -> Any:
                return restore(part.form, runtime(part, *args))[0]

            stack.enter_context(swapped(model.get_submodule(part.path), 'forward', rows))
        yield


@dataclass
class Agreement:
    """How far the predictions of torch and of onnxruntime agree, over all images so far.

    Attributes:
        images: how many.
        found: detections of torch, and of onnxruntime.
        matched: those that both found.
        at_edge: those that one found alone, with a score at the lowest that it kept.
        box: largest difference of matched boxes, in pixels; score: of their scores.
        pixels: smallest share of an image's pixels with the same label, or of a mask's; None without such.
        problems: what does not agree, in words.
    """

    images: int = 0
    found: Tuple[int, int] = (0, 0)
    matched: int = 0
    at_edge: int = 0
    box: float = 0.
    score: float = 0.
    pixels: Optional[float] = None
    problems: List[str] = field(default_factory=list)

    def add(self, name: str, own: Any, other: Any) -> None:
        """Compare the data samples of one image.

        Args:
            name: of the image, for messages.
            own, other: of torch, of onnxruntime.
        """
        self.images += 1
        if 'pred_instances' in own:
            self._instances(name, own.pred_instances, other.pred_instances)
        for key, part in (('pred_sem_seg', 'data'), ('pred_panoptic_seg', 'sem_seg')):
            if key in own:
                first, second = (torch.as_tensor(sample.get(key).get(part)) for sample in (own, other))
                self._pixels(name, 'label map', first, second)

    def _instances(self, name: str, own: Any, other: Any) -> None:
        self.found = (self.found[0] + len(own), self.found[1] + len(other))
        free = torch.ones(len(other), dtype=torch.bool)
        alone = []
        edge = max(float(side.scores.min()) if len(side) else 0. for side in (own, other)) + SCORE
        for index in range(len(own)):
            far = (other.bboxes - own.bboxes[index]).abs().amax(dim=1)
            apart = (other.scores - own.scores[index]).abs()
            fits = free & (other.labels == own.labels[index]) & (far <= BOX) & (apart <= SCORE)
            if not fits.any():
                alone.append(float(own.scores[index]))
                continue
            best = int(torch.where(fits, far, float('inf')).argmin())
            free[best] = False
            self.matched += 1
            self.box, self.score = max(self.box, float(far[best])), max(self.score, float(apart[best]))
            if 'masks' in own:
                self._pixels(name, 'mask', *(torch.as_tensor(side.masks[at]) for side, at in (
                    (own, index), (other, best))))
        left = [(score, 'torch') for score in alone] + [
            (float(score), 'onnxruntime') for score in other.scores[free]]
        self.at_edge += sum(score <= edge for score, _ in left)
        real = [f'{side} alone finds one with score {score:.3f}' for score, side in left if score > edge]
        if real:
            self.problems.append(f'{name}: {"; ".join(real[:3])}' + (f'; {len(real) - 3} more' if real[3:] else ''))

    def _pixels(self, name: str, what: str, own: Tensor, other: Tensor) -> None:
        share = float((own == other).float().mean()) if own.shape == other.shape else 0.
        self.pixels = share if self.pixels is None else min(self.pixels, share)
        if share < AGREEMENT:
            self.problems.append(f'{name}: {100 * (1 - share):.2g} % of the pixels of a {what} differ')

    def text(self) -> str:
        """What was compared and how it came out, in one line."""
        words = [count(self.images, 'image')]
        if any(self.found):
            words.append(f'{self.found[0]} detections of torch, {self.found[1]} of onnxruntime, {self.matched} of them '
                         f'the same: boxes within {self.box:.2g} pixels, scores within {self.score:.1g}'
                         + (f', {self.at_edge} at the lowest score kept' if self.at_edge else ''))
        if self.pixels is not None:
            words.append(f'at least {100 * self.pixels:.3f} % of the pixels the same')
        return '; '.join(words)

    @property
    def empty(self) -> bool:
        """Whether there was nothing to compare."""
        return not any(self.found) and self.pixels is None


def compare(cfg: Config, model: Any, parts: Sequence[Part], paths: Sequence[str], size: Tuple[int, int]) -> Agreement:
    """Predict images with torch and with onnxruntime, both with the host's own post-processing.

    Args:
        cfg: of the student, whose test pipeline reads the images.
        model: its model, in evaluation, with its weights.
        parts: what :func:`kd_mm.lab.onnx_export.export` has written.
        paths: of the images.
        size: of the images in the graph.

    Raises:
        ValueError: an image cannot be read or has another size after the pipeline.
    """
    runtime = Runtime(parts)

    def other(data: Dict[str, Any]) -> Sequence[Any]:
        with on_runtime(model, runtime):
            return model.test_step(data)

    return compare_with(cfg, model, other, paths, None if sliding_window(model) else size)


def compare_with(cfg: Config, model: Any, other: Callable[[Dict[str, Any]], Sequence[Any]], paths: Sequence[str],
                 size: Optional[Tuple[int, int]]) -> Agreement:
    """Predict images with a model and with something else that should find the same.

    Args:
        cfg: of the model, whose test pipeline reads the images.
        model: in evaluation, with its weights.
        other: gives the data samples with the predictions of a batch, as ``model.test_step`` does.
        paths: of the images.
        size: height and width to which images are brought, see :func:`prediction_pipeline`.

    Raises:
        ValueError: an image cannot be read.
    """
    agreement = Agreement()
    with data_scope_of(cfg):
        pipeline = Compose(prediction_pipeline(cfg, size))
    for index, path in enumerate(paths):
        try:
            sample = pipeline(dict(img_path=os.path.abspath(path), img_id=index, seg_fields=[]))
        except Exception as error:  # transforms raise anything
            raise ValueError(f'{path} does not go through the test pipeline of the config: {type(error).__name__}: '
                             f'{error}') from error
        data = dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']])
        with torch.no_grad():
            own = model.test_step(copy.deepcopy(data))
            found = other(data)
        agreement.add(os.path.basename(path), own[0], found[0])
    return agreement


def prediction_pipeline(cfg: Config, size: Optional[Tuple[int, int]]) -> List[Dict[str, Any]]:
    """The transforms that a config tests with, without labels.

    Args:
        cfg: a config of the host.
        size: height and width to which images are brought, without keeping their proportions; None: as the config does.

    Raises:
        ValueError: the config has none.
    """
    section = (cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}).get('dataset') or {}
    while 'dataset' in section:
        section = section['dataset']
    steps = section.get('pipeline') or cfg.get('test_pipeline')
    if not steps:
        raise ValueError('the config has no test pipeline (test_dataloader.dataset.pipeline), which reads the images '
                         'of --check. Give one with --config')
    found: List[Dict[str, Any]] = []
    for step in steps:
        name = type_name(step)
        resizes = 'Resize' in name or name.startswith('Pad')
        if 'Annotations' in name or (resizes and size is not None):
            continue
        found.append(copy.deepcopy(dict(step)))
        if size is not None and name.startswith('LoadImage'):
            found.append(dict(type='Resize', scale=(size[1], size[0]), keep_ratio=False))
    return found


def default_size(cfg: Config, model: Any) -> Tuple[int, int]:
    """Height and width of the images that a config tests with, up to the next multiple that the model pads to.

    Raises:
        ValueError: its test pipeline names none.
    """
    window = sliding_window(model)
    if window is not None:
        return window
    scales = [step.get('scale') for step in prediction_pipeline(cfg, None) if 'Resize' in str(step['type'])]
    if not scales or not isinstance(scales[0], (list, tuple)) or len(scales[0]) != 2:
        raise ValueError('the test pipeline of the config names no size of the images: give --size HEIGHT WIDTH')
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1) or 1
    width, height = (-(-int(side) // divisor) * divisor for side in scales[0])
    return height, width
