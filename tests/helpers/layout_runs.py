"""A distilled training on a data set of ``layouts.py``: the stock models, narrow, with the host's loops.

The classes are those of the layout; the teacher is wider and normalises in another way.
"""

import copy
import math
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Sequence

import torch
from layouts import Layout
from mmengine.hooks import Hook
from stock import detector, distill_hook, hook, losses_of, make_runner, retinanet_model, segmentor, teacher_of

FEATURES = dict(loss_fgd=dict(type='FGDLoss', at='neck'),
                loss_region=dict(type='FitNetLoss', at='neck', region=dict(type='GTBoxRegion')))
PIXELS = dict(loss_cwd=dict(type='CWDLoss', at='decode_head.conv_seg'),
              loss_kd=dict(type='SigmoidKDLoss', at='@logits'))
META = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
LOAD = dict(type='LoadImageFromFile')
BOXES = dict(type='LoadAnnotations', with_bbox=True)
RESIZE = dict(type='Resize', scale=(64, 64), keep_ratio=True)
#: mean and std of the teachers.
NORM = dict(mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0])


class Watch(Hook):
    """Keeps the losses of each step, and what the first layers of student and teacher were given."""

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self.losses: List[Dict[str, float]] = []
        self.batches: List[Any] = []
        self.seen: Dict[str, List[torch.Tensor]] = dict(student=[], teacher=[])

    def before_train(self, runner: Any) -> None:
        distiller = distill_hook(runner).distiller
        for name, model in (('student', distiller.student), ('teacher', distiller.teacher.model)):
            model.backbone.register_forward_pre_hook(
                lambda module, inputs, name=name: self.seen[name].append(inputs[0].detach().clone()))

    def before_val_epoch(self, runner: Any) -> None:
        self.steps = {name: list(found) for name, found in self.seen.items()}

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append({key: float(value.detach()) for key, value in outputs.items()})
        self.batches.append(data_batch)


def loader(dataset: Dict[str, Any], pipeline: Sequence[Any], batch: int, shuffle: bool, **extra: Any) -> Dict[str, Any]:
    dataset = copy.deepcopy(dataset)
    dataset.setdefault('pipeline', list(pipeline))
    return dict(batch_size=batch, num_workers=0, persistent_workers=False,
                sampler=dict(type='DefaultSampler', shuffle=shuffle), dataset=dataset, **extra)


def det_config(layout: Layout, work_dir: Any, steps: int = 2, pipeline: Optional[Sequence[Any]] = None,
               **train: Any) -> Any:
    """RetinaNet on a layout, with its validation at the end.

    Args:
        pipeline: of the training. Default: boxes, and a resize.
        train: entries of ``train_dataloader`` in place of the usual.
    """
    cfg = detector(work_dir, work_dir, steps=steps)
    cfg.merge_from_dict(dict(model=retinanet_model(classes=len(layout.classes))))
    cfg.model.test_cfg.update(score_thr=0.0, max_per_img=20)
    cfg.train_dataloader = {**loader(layout.dataset, pipeline or [LOAD, BOXES, RESIZE, dict(type='PackDetInputs')], 2,
                                     True), **train}
    test = [LOAD, RESIZE, BOXES, dict(type='PackDetInputs', meta_keys=(*META, *layout.meta_keys))]
    return with_loops(cfg, layout, test, steps)


def seg_config(layout: Layout, work_dir: Any, steps: int = 2, pipeline: Optional[Sequence[Any]] = None,
               **train: Any) -> Any:
    """FCN on a layout, with its validation at the end."""
    cfg = segmentor(work_dir, work_dir, steps=steps, classes=len(layout.classes))
    annotations = dict(type='LoadAnnotations', reduce_zero_label=None)
    cfg.train_dataloader = {**loader(layout.dataset, pipeline or [
        LOAD, dict(annotations), dict(type='Resize', scale=(64, 64), keep_ratio=True),
        dict(type='PackSegInputs')], 2, True), **train}
    test = [LOAD, dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(annotations), dict(type='PackSegInputs')]
    return with_loops(cfg, layout, test, steps)


def with_loops(cfg: Any, layout: Layout, pipeline: Sequence[Any], steps: int) -> Any:
    for kind, loop in (('val', 'ValLoop'), ('test', 'TestLoop')) if layout.evaluator else ():
        cfg[f'{kind}_dataloader'] = loader(dict(layout.dataset, test_mode=True), pipeline, 1, False)
        cfg[f'{kind}_evaluator'] = copy.deepcopy(layout.evaluator)
        cfg[f'{kind}_cfg'] = dict(type=loop)
    cfg.train_cfg.val_interval = steps
    return cfg


def teacher(cfg: Any, norm: Any = None) -> Dict[str, Any]:
    """A wider model of the same kind, with another normalisation."""
    wider = retinanet_model(base=12, neck=24, classes=0) if cfg.default_scope == 'mmdet' else dict(
        decode_head=dict(channels=24))
    wider.get('bbox_head', {}).pop('num_classes', None)
    return teacher_of(cfg, **wider, data_preprocessor=norm or NORM)


def distilled(cfg: Any, losses: Any = None, model: Any = None, **options: Any) -> Any:
    """Train with distillation, and look at what a data set may spoil: ``runner``, ``watch`` and ``hook``."""
    losses = losses or (FEATURES if cfg.default_scope == 'mmdet' else PIXELS)
    runner, watch = make_runner(cfg, [hook(model or teacher(cfg), losses, speed='exact', **options)]), Watch()
    runner.register_hook(watch)
    runner.train()
    assert watch.losses and all(math.isfinite(value) for step in watch.losses for value in step.values())
    assert all(name in step for name in losses for step in watch.losses)
    found = distill_hook(runner)
    return SimpleNamespace(runner=runner, watch=watch, hook=found, distiller=found.distiller)


def without_objects(model: Any, distiller: Any, data: Any) -> Dict[str, Any]:
    """The losses of a batch in which no picture has an object: what needs none is learned from, regions of boxes weigh
    nothing, and every gradient is finite."""
    samples = data['data_samples']
    if isinstance(samples, dict):
        samples['bboxes_labels'] = samples['bboxes_labels'][:0]
    else:
        for sample in samples:
            sample.gt_instances = sample.gt_instances[:0]
    found = losses_of(model, distiller, data)
    assert found['loss_fgd'] > 0 and found['loss_region'] == 0
    assert all(torch.isfinite(found[name]).all() for name in distiller.terms)
    model.parse_losses(found)[0].backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)
    return found


def pictures(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    """What a model was given, in the levels of the files."""
    preprocessor = model.data_preprocessor
    if getattr(preprocessor, 'mean', None) is None:  # the pipeline normalises
        return inputs
    return inputs * preprocessor.std.view(1, -1, 1, 1) + preprocessor.mean.view(1, -1, 1, 1)


def same_pictures(run: Any) -> bool:
    """Whether the teacher was shown, in every step, what the student saw.

    Padding is black for each, and so is for the teacher the outermost row, which a resize of the batch mixes with it.
    """
    for own, theirs in zip(run.watch.seen['student'], run.watch.seen['teacher']):
        found = [pictures(model, inputs) for model, inputs in (
            (run.distiller.student, own), (run.distiller.teacher.model, theirs))]
        inside = (own != 0).any(1, keepdim=True).float()  # the student pads with 0 after its normalisation
        inside = (-torch.nn.functional.max_pool2d(-inside, 3, 1, 1) > 0).expand_as(own)
        if own.shape != theirs.shape or not torch.allclose(found[0][inside], found[1][inside], atol=0.05):
            return False
    return bool(run.watch.seen['student'])
