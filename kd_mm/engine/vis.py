"""Pictures of a distillation while it trains."""

import copy
import os
import tempfile
import time
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook, IterTimerHook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn

from kd_mm.engine.holding import Shards
from kd_mm.engine.hook import DistillHook
from kd_mm.engine.pictures import Level, Lookout
from kd_mm.hosts.models import as_names, classes_of, task_of
from kd_mm.hosts.table import host_of
from kd_mm.ops import distributed, drawing
from kd_mm.ops.checks import entries, number, whole
from kd_mm.ops.modes import eval_mode, preserved_random_state
from kd_mm.ops.problems import ConfigProblems
from kd_mm.ops.words import count
from kd_mm.registry import HOOKS

#: Tiles in a row of maps, and their width in pixels.
COLUMNS, TILE = 5, 220
#: Predicted objects of a model that are drawn, the best ones.
BOXES = 20
#: Where the pictures are, below the work dir.
FOLDER = 'distill_vis'
NOTHING_TO_DRAW = ('kd_mm.DistillVisHook draws what a kd_mm.DistillHook distils, and custom_hooks has none. Add it, or '
                   'take this hook out')
#: Width of everything.
WIDTH = COLUMNS * TILE + (COLUMNS - 1) * drawing.GAP


@HOOKS.register_module()
class DistillVisHook(Hook):
    """Draws what student and teacher see in a few images, while the student is distilled.

    A hook of its own beside :class:`~kd_mm.engine.hook.DistillHook`, because a training needs none of it::

        custom_hooks = [dict(type='kd_mm.DistillHook', ...), dict(type='kd_mm.DistillVisHook', interval=1000)]

    One picture an image and time.  Above: the image with its ground truth, and what both models predict.  Below, a row
    for each level of each loss: the features of teacher, student and adapted student in colours of one scale (root mean
    square over the channels; for class logits the best score), the region, and the *pull*: the norm of the loss's
    gradient at each cell of the student.  For losses of whole heads: the best class score of both, and the difference.

    The pictures go to all backends of the host's Visualizer as ``distill_image_0``, and to
    ``WORK_DIR/distill_vis/image_0_step_1000.png``.  The images are loaded once, through the training pipeline, from a
    copy of the data set.  Passes are in eval mode and on copies of what computes the losses: weights, statistics,
    random numbers and the order of the data are those of a training without this hook, bit for bit.

    Args:
        interval: iterations from one picture to the next. Default: a tenth of the training. The first one is made
            before the first step.
        images: how many, spread over the training data; or a list of their indices. Default 2.
        score_thr: boxes with a lower score are not drawn, and no more than the 20 best. Default 0.3, as the hosts have
            it.

    Raises:
        ValueError: (before the first step) an argument is wrong, the config has no :class:`DistillHook`, or the data
            set has no such image.
    """

    # After DistillHook, which attaches in before_train; the order makes no difference to the training.
    priority = 'LOW'

    def __init__(self, interval: Optional[int] = None, images: Union[int, Sequence[int]] = 2, score_thr: float = 0.3):
        owner = 'kd_mm.DistillVisHook'
        self.interval = None if interval is None else whole(owner, 'interval', interval)
        self.images: Any = (entries(owner, 'images', images, _index) if isinstance(images, (list, tuple))
                            else whole(owner, 'images', images))
        self.score_thr = number(owner, 'score_thr', score_thr, 0, 1)
        self._given: List[Tuple[np.ndarray, Dict[str, Any]]] = []
        self._lookout: Optional[Lookout] = None
        self._told = False

    def before_train(self, runner: Runner) -> None:
        """Load the images and make the first pictures."""
        hook = next((hook for hook in runner.hooks if isinstance(hook, DistillHook)), None)
        if hook is None or hook.distiller is None:
            raise ConfigProblems(NOTHING_TO_DRAW)
        if isinstance(hook.holding, Shards):
            raise ConfigProblems('kd_mm.DistillVisHook looks at the whole student, and with FSDPStrategy no rank has '
                                 'it. Take this hook out, or train with DDPStrategy')
        if hook.distiller.branches is not None:
            raise ConfigProblems('kd_mm.DistillVisHook takes pictures from the training data, and those of a '
                                 'semi-supervised detector have several branches. Take this hook out')
        if self.interval is None:
            self.interval = max(runner.max_iters // 10, 1)
        with preserved_random_state(0):
            self._given = fixed_images(runner.train_dataloader.dataset, self.images, hook.distiller.student)
        self._lookout = Lookout(hook.distiller.current)
        print_log(f'kd_mm.DistillVisHook: {count(len(self._given), "image")} every '
                  f'{count(self.interval, "iteration")}, in {os.path.join(runner.work_dir, FOLDER)}', 'current')
        self._draw(runner, runner.iter)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        done = runner.iter + 1
        if self.interval and (done % self.interval == 0 or done == runner.max_iters):
            with off_the_clock(runner):
                self._draw(runner, done)

    def after_train(self, runner: Runner) -> None:
        """Forget the images."""
        self._given, self._lookout = [], None

    def _draw(self, runner: Runner, step: int) -> None:
        assert self._lookout is not None
        student = self._lookout.current.student
        device = next(student.parameters()).device
        # Every rank looks: a loss may gather from all of them, and a teacher be in shards. The first one draws.
        for index, (picture, given) in enumerate(self._given):
            with preserved_random_state(0, device if device.type == 'cuda' else None):
                inputs = given['inputs'].to(device)
                samples = [sample.to(device) for sample in copy.deepcopy(given['data_samples'])]
                levels, missing = self._lookout.look(inputs, samples)
                if missing and not self._told:
                    print_log('kd_mm.DistillVisHook: no maps of ' + '; '.join(
                        f'{name}: {why}' for name, why in missing.items()), 'current')
                self._told = True
                tops = list(self._tops(runner, picture, inputs, samples))
                if distributed.rank():
                    continue
                drawn = sheet(f'step {step}, image {index}', tops, levels, missing, picture.shape[:2])
            folder = os.path.join(runner.work_dir, FOLDER)
            os.makedirs(folder, exist_ok=True)
            cv2.imwrite(os.path.join(folder, f'image_{index}_step_{step}.png'), drawn[..., ::-1])
            runner.visualizer.add_image(f'distill_image_{index}', drawn, step)

    # ------------------------------------------------------------------ the images themselves

    def _tops(self, runner: Runner, picture: np.ndarray, inputs: Tensor, samples: Any) -> Iterator[
            Tuple[str, Optional[np.ndarray]]]:
        """The image with its ground truth, and with the predictions of both models."""
        assert self._lookout is not None
        step = self._lookout.step
        width = (WIDTH - 2 * drawing.GAP) // 3
        size = max(round(picture.shape[0] * width / picture.shape[1]), 1), width
        canvas = cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
        student = step.student
        yield 'ground truth', self._annotated(runner, canvas, truth(samples[0], size), True)
        batch = step.batch_of(inputs, samples)
        sides: List[Tuple[str, Any, Tensor, Optional[List[str]]]] = [('student', student, inputs, None)]
        for name, teacher in step.teachers.items():
            sides.append((step.word(name), teacher.model, teacher.prepare(inputs, samples, batch)[0], teacher.classes))
        for word, model, images, classes in sides[:3]:
            if task_of(model) is None or images.shape[-2:] != inputs.shape[-2:]:
                yield f'{word}: ' + ('gives no predictions' if task_of(model) is None else 'sees another size'), None
                continue
            try:
                with torch.no_grad(), eval_mode(model):
                    found, = model(images, [at_size(samples[0], size)], mode='predict')
            except Exception as error:  # hosts raise anything; a picture is not worth a training
                yield f'{word}: {type(error).__name__} in its prediction', None
                continue
            instances = getattr(found, 'pred_instances', None)
            if instances is not None and len(instances) > BOXES:  # a young student finds hundreds
                found.pred_instances = instances[instances.scores.argsort(descending=True)[:BOXES]]
            with of_classes(runner.visualizer, classes):
                yield f'{word}: prediction', self._annotated(runner, canvas, found, False)

    def _annotated(self, runner: Runner, canvas: np.ndarray, sample: Any, of_truth: bool) -> np.ndarray:
        """The canvas with a data sample on it, drawn by the host's visualizer."""
        if distributed.rank():
            return canvas
        extra = {'pred_score_thr': self.score_thr} if hasattr(sample, 'pred_instances') else {}
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, 'drawn.png')
            try:
                runner.visualizer.add_datasample('kd_mm', canvas, sample, draw_gt=of_truth, draw_pred=not of_truth,
                                                 out_file=file, **extra)
            except Exception:  # a palette too short, a kind of result that it cannot draw
                return canvas
            drawn = cv2.imread(file)
        return canvas if drawn is None else drawn[..., ::-1]


@contextmanager
def off_the_clock(runner: Runner) -> Iterator[None]:
    """What is done inside counts neither as time of a step nor as waiting for data: the Runner's clock stands still.

    Its timer takes everything from the end of an iteration to the next one for ``data_time``.
    """
    start = time.time()
    try:
        yield
    finally:
        for hook in runner.hooks:
            if isinstance(hook, IterTimerHook) and hasattr(hook, 't'):
                hook.t += time.time() - start


def _index(owner: str, name: str, value: Any) -> int:
    return whole(owner, name, value, 0)


def fixed_images(dataset: Any, chosen: Any, student: nn.Module) -> List[Tuple[np.ndarray, Dict[str, Any]]]:
    """(picture, batch of one) of some images, once through the pipeline of a copy of the data set.

    Raises:
        ValueError: there is no such image, or the data set has no indices.
    """
    owner = 'kd_mm.DistillVisHook'
    if not hasattr(dataset, '__len__') or not hasattr(dataset, '__getitem__'):
        raise ConfigProblems(f'{owner}: the training data ({type(dataset).__name__}) has no indices, from which '
                             'images could be chosen. Take the hook out')
    length = len(dataset)
    if isinstance(chosen, int):
        chosen = [index * length // min(chosen, length) for index in range(min(chosen, length))]
    beyond = [index for index in chosen if index >= length]
    if beyond:
        raise ConfigProblems(f'{owner}: images={list(chosen)!r}: there are {length} images, so no index {beyond[0]}')
    # Mosaics and their like remember images in their transforms, and with num_workers=0 the loader uses these, too.
    own = light_copy(dataset)
    found = []
    preprocessor: Any = student.data_preprocessor
    host = host_of(student)
    training = host is None or host.batch is None  # else it takes a whole batch in the form of the host's loader
    for index in chosen:
        item = own[index]
        picture = item['inputs']
        kept = getattr(preprocessor, 'batch_augments', None)
        try:
            if kept is not None:
                preprocessor.batch_augments = None  # they draw sizes, and remember them
            batch = preprocessor(pseudo_collate([item]), training)
        finally:
            if kept is not None:
                preprocessor.batch_augments = kept
        found.append((in_rgb(picture), dict(
            inputs=batch['inputs'].cpu(), data_samples=[sample.cpu() for sample in batch['data_samples']])))
    return found


def light_copy(dataset: Any) -> Any:
    """A copy of a data set, and of all data sets inside, that shares their annotations."""
    shared: Dict[int, Any] = {}

    def visit(part: Any, depth: int = 0) -> None:
        for name, value in vars(part).items() if hasattr(part, '__dict__') else ():
            if isinstance(value, np.ndarray) or name in ('data_list', 'coco', '_metainfo'):
                shared[id(value)] = value
            elif depth < 8 and name in ('dataset', 'datasets'):
                for inner in value if isinstance(value, (list, tuple)) else [value]:
                    visit(inner, depth + 1)

    visit(dataset)
    return copy.deepcopy(dataset, shared)


def in_rgb(image: Tensor) -> np.ndarray:
    """(h, w, 3) for the eye of a picture (C, h, w) as the hosts load it: blue first, grey, or of some bands."""
    array = image.detach().cpu().float().clamp(0, 255).byte().numpy().transpose(1, 2, 0)
    if array.shape[2] == 3:
        array = array[..., ::-1]
    elif array.shape[2] < 3:
        array = array[..., :1].repeat(3, axis=2)
    return np.ascontiguousarray(array[..., :3])


def at_size(sample: Any, size: Tuple[int, int]) -> Any:
    """A copy of a data sample whose predictions come out for a picture of this size (h, w)."""
    sample = copy.deepcopy(sample)
    height, width = sample.metainfo['img_shape'][:2]
    sample.set_metainfo(dict(ori_shape=size, scale_factor=(width / size[1], height / size[0]), flip=False,
                             flip_direction=None))
    return sample


def truth(sample: Any, size: Tuple[int, int]) -> Any:
    """A copy of a data sample with its boxes or label map for a picture of this size (h, w)."""
    scaled = sample.new(metainfo=sample.metainfo)
    height, width = sample.metainfo['img_shape'][:2]
    instances = getattr(sample, 'gt_instances', None)
    if instances is not None and 'bboxes' in instances:
        boxes, factors = instances.bboxes, (size[1] / width, size[0] / height)
        kept = type(instances)()
        if hasattr(boxes, 'rescale_'):  # those of the hosts know their form, such as rotated ones
            boxes = boxes.clone()
            boxes.rescale_(factors)
            kept.bboxes = boxes.tensor
        else:
            kept.bboxes = boxes * boxes.new_tensor(factors * 2)
        kept.labels = instances.labels
        scaled.gt_instances = kept
    labels = getattr(sample, 'gt_sem_seg', None)
    if labels is not None:
        area = labels.data[..., :height, :width]
        grown = nn.functional.interpolate(area[None].float(), size=size, mode='nearest')[0].to(area.dtype)
        scaled.gt_sem_seg = type(labels)(data=grown)
    return scaled


@contextmanager
def of_classes(visualizer: Any, classes: Optional[Sequence[str]]) -> Iterator[None]:
    """The visualizer names other classes inside."""
    before = visualizer.dataset_meta
    if classes and list(classes) != as_names(classes_of(before) or ()):
        visualizer.dataset_meta = dict(classes=tuple(classes), palette=drawing.hues(len(classes)))
    try:
        yield
    finally:
        visualizer.dataset_meta = before


def sheet(title: str, tops: Sequence[Tuple[str, Optional[np.ndarray]]], levels: Sequence[Level],
          missing: Dict[str, str], shape: Tuple[int, int]) -> np.ndarray:
    """Everything about one image as one picture.

    Args:
        title: above all.
        tops: caption -> picture, all of one size.
        levels: of all terms.
        missing: name of a term -> why there are no maps of it.
        shape: (h, w) of the image, whose form the tiles have.
    """
    rows = [drawing.text_line(title, WIDTH, bold=True)]
    size = next(picture.shape[:2] for _, picture in tops if picture is not None)
    for start in range(0, len(tops), 3):
        rows.append(drawing.beside([drawing.tile(picture, size, caption)
                                    for caption, picture in tops[start:start + 3]], WIDTH))
    height = max(round(shape[0] * TILE / shape[1]), 1)
    for level in levels:
        low, high = drawing.limits(list(level.maps.values()))
        scale = f'both models in one scale, dark {low:.3g}, bright {high:.3g}'
        rows.append(drawing.text_line(f'{level.title}: {level.what}; {scale}', WIDTH, bold=True))
        tiles = [drawing.tile(drawing.in_colours(values, low, high), (height, TILE),
                              f'{caption}, mean {np.nanmean(values):.2g}')
                 for caption, values in level.maps.items()]
        for caption, values in level.others.items():
            top = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
            tiles.append(drawing.tile(drawing.in_colours(values, 0.0, top), (height, TILE),
                                      f'{caption} (0 to {top:.3g})'))
        rows.append(drawing.beside(tiles, WIDTH))
    rows += [drawing.text_line(f'{name}: no maps ({why})', WIDTH) for name, why in missing.items()]
    return drawing.below(rows)

