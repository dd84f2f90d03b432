"""Runner life cycle <-> Distiller: the only file that knows the Runner."""

import os
from collections.abc import Collection
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.resume import SIDE_KEY, restore, side_state
from kd_mm.hosts.checkpoint import allow_mmengine_checkpoints
from kd_mm.hosts.files import settle
from kd_mm.hosts.models import as_names
from kd_mm.ops.checks import boolean, from_zero, whole
from kd_mm.ops.problems import Problems
from kd_mm.registry import HOOKS
from kd_mm.teachers.ema import EMATeacher
from kd_mm.teachers.speed import AUTO


@HOOKS.register_module()
class DistillHook(Hook):
    """Distils a teacher into the model that the Runner trains.

    Add it to ``custom_hooks`` of any mmdet or mmseg config::

        custom_hooks = [dict(
            type='kd_mm.DistillHook',
            teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
            losses=dict(loss_cwd=dict(type='CWDLoss', at='neck', tau=1.0, loss_weight=10.0)))]

    The saved ``state_dict`` has the stock student's keys and loads strictly in the plain config; adapters are kept
    under ``checkpoint['kd_mm']`` for a resume, with the networks that adversarial losses train against the student and
    their optimizers.  ``val()`` and ``test()`` build no teacher.

    Args:
        teacher: path of a config, name of an installed one (``mmdet::...``, ``mmseg::...``), a config dict; or
            ``'student'``, ``'self'``, ``dict(type='EMATeacher')``, ``dict(type='package.Class', preprocess=...)``, see
            :mod:`kd_mm.teachers.sources`.
        losses: dict of loss name (starting with ``loss_``) -> config with ``type``, ``at`` (or ``student_at`` and
            ``teacher_at``), optionally ``levels``, ``adapter``, ``region``, and the loss's own arguments.
        teacher_ckpt: path or URL of the teacher's weights. Default None: the published weights of an installed config.
            ``'random'`` uses untrained weights (tests).
        teacher_strict: whether the weights must fit the config exactly. Default True.
        teachers: several teachers instead of one: name -> ``dict(teacher=..., teacher_ckpt=..., teacher_strict=...,
            speed=...)``; each loss then says ``teacher='name'``, or names several whose outputs are averaged. Default
            none.
        inherit: student modules that start from the teacher's weights, such as ``('neck', 'bbox_head')``. Default none.
        task_loss_weight: factor on the student's own losses; 0 trains from the teacher alone. Default 1.
        adapter_lr_mult: learning rate of the trainable extras as a multiple of the base learning rate. Default 1.
        adapter_decay_mult: their weight decay as a multiple of the base weight decay. Default 1.
        seed: of the initial adapters and of random masks. Default 0.
        speed: in which form the teacher runs. ``'auto'`` (default): the fastest that a fixed rule knows for the model
            and the device and that keeps every tap within 1e-4 of the exact forward on the first batch; the log says
            what was taken. ``'exact'``: the host's own forward, bit for bit. ``'tune'``: forms are tried in the first
            steps and the fastest is kept. Or a dict of what is wanted, see
            :class:`kd_mm.teachers.speed.Speed`, for example ``dict(fold=True, precision='bf16')``.

    Raises:
        ValueError: (before the first step) the configuration is wrong; all problems in one message.
        RuntimeError: (before the first step) a Runner or optimizer that is not supported.
    """

    # Before EMAHook and CheckpointHook: a non-finite loss must stop training before anything is saved.
    priority = 'ABOVE_NORMAL'

    def __init__(self, teacher: Any = None, losses: Any = None, teacher_ckpt: Optional[str] = None,
                 teacher_strict: bool = True, teachers: Any = None, inherit: Sequence[str] = (),
                 task_loss_weight: float = 1.0, adapter_lr_mult: float = 1.0,
                 adapter_decay_mult: float = 1.0, seed: int = 0, speed: Any = AUTO):
        problems = Problems()
        for fault in argument_faults(dict(
                teacher_strict=teacher_strict, teachers=teachers, inherit=inherit, adapter_lr_mult=adapter_lr_mult,
                adapter_decay_mult=adapter_decay_mult, seed=seed)).values():
            problems.add(fault)
        problems.raise_any()
        self.config: Dict[str, Any] = dict(
            teacher=teacher, losses=losses, teacher_ckpt=teacher_ckpt, teacher_strict=teacher_strict,
            teachers=teachers, inherit=inherit, task_loss_weight=task_loss_weight, seed=seed, speed=speed)
        self.adapter_lr_mult, self.adapter_decay_mult = adapter_lr_mult, adapter_decay_mult
        self.distiller: Optional[Distiller] = None
        self._resumed = False  # from a checkpoint; `resume=True` in an empty work dir is a fresh start
        self._averaged = False  # whether that checkpoint has an EMAHook's average
        self._early: Any = None  # what was loaded before there was a distiller
        self._rate = 1.0  # the student's learning rate as a fraction of its first one
        # Here and not later: the host resumes from its own checkpoint before any other method of ours is called.
        allow_mmengine_checkpoints()

    def before_run(self, runner: Runner) -> None:
        """Build and check everything, and give the extras to the optimizer (training only)."""
        if not isinstance(runner, Runner):
            raise RuntimeError(other_runner(type(runner).__name__))
        # before_run fires for val() and test() too, before and after training, and then there is nothing to build.
        if self.distiller is not None or not self._trains(runner):
            return
        count = sum(isinstance(hook, DistillHook) for hook in runner.hooks)
        if count > 1:
            raise ValueError(listed(count))
        if isinstance(runner.optim_wrapper, OptimWrapperDict):
            raise RuntimeError(SEVERAL_OPTIMIZERS)
        if multi_branch(_unwrap(runner.model)):
            raise ValueError(MULTI_BRANCH)
        dataset = runner.train_dataloader.dataset
        if hasattr(dataset, '__len__') and len(dataset) == 0:
            raise ValueError(f'the training data set is empty: {_describe_dataset(runner)}. Check data_root and '
                             'data_prefix, for example with --cfg-options train_dataloader.dataset.data_root=PATH')
        self.distiller = Distiller(
            _unwrap(runner.model), classes=_classes(dataset), scope=_scope(runner), max_steps=runner.max_iters,
            folder=folder_of(runner.cfg), **self.config)
        check_folded(self.distiller, runner.cfg)
        check_loop(self.distiller, _batch_size(runner), isinstance(runner.train_loop, EpochBasedTrainLoop))
        entries = [*(runner.cfg.get('custom_hooks') or ()), *(runner.cfg.get('default_hooks') or {}).values()]
        if any(settle(entry, folder_of(runner.cfg)) for entry in entries if _is_distillation(entry)):
            runner.dump_config()  # again: beside the copy in the work dir they are not
        if is_model_wrapper(runner.model):
            self.distiller.follow(runner.model)
        for teacher in self.distiller.teachers.values():
            for note in teacher.notes:
                print_log(note, 'current', level=30)
        for note in guesses(self.distiller):
            print_log(f'kd_mm: {note}', 'current')
        self._add_parameters(runner)
        if self._resumed:
            restore(self.distiller, *(self._early or (None, None)))
            self._early = None
        for term in self.distiller.all_terms():
            print_log(f'kd_mm: {term.name}: {type(term.loss).__name__}, student {term.student_paths}, teacher '
                      f'{term.teacher_paths}, adapter {type(term.adapter).__name__ if term.adapter else None}, '
                      f'{sum(p.numel() for p in term.parameters())} trainable extras, '
                      f'{term.describe_levels()}', 'current')

    @staticmethod
    def _trains(runner: Runner) -> bool:
        loop = getattr(runner, '_train_loop', None)
        return loop is not None and not isinstance(loop, dict) and not isinstance(runner.optim_wrapper, dict)

    def _add_parameters(self, runner: Runner) -> None:
        """A parameter group for the extras that every scheduler treats like the student's own.

        The group is there from the start of the schedule, with the learning rate that the schedulers' first step has
        already left on the other groups; adding it with the plain ``lr`` would be scaled up by a warm-up instead.
        """
        assert self.distiller is not None
        named = {f'kd_mm.{name}': parameter for name, parameter in self.distiller.named_parameters()
                 if parameter.requires_grad}
        if not named:
            return
        optimizer = runner.optim_wrapper.optimizer
        groups = optimizer.param_groups
        base = optimizer.defaults['lr'] * _lr_scale(runner)
        reference = max(groups, key=lambda group: group.get('initial_lr', group['lr']))
        first = reference.get('initial_lr', reference['lr'])
        # A one-cycle schedule sets its own rates, the same for every group, whatever the optimizer was given.
        own_rates = 'max_lr' in reference
        ratio = self.adapter_lr_mult * (1.0 if own_rates or not first else base / first)
        group = {key: value for key, value in reference.items() if key not in ('params', 'param_names')}
        for key in ('lr', 'initial_lr', 'max_lr', 'min_lr'):
            if isinstance(group.get(key), (int, float)):
                group[key] = group[key] * ratio
        if 'weight_decay' in group:
            group['weight_decay'] = optimizer.defaults['weight_decay'] * self.adapter_decay_mult
        if 'param_names' in reference:  # layer-decay constructors name parameters; torch wants all groups to, or none
            group['param_names'] = list(named)
        before = len(groups)
        optimizer.add_param_group(dict(group, params=list(named.values())))
        for scheduler in _schedulers(runner):
            # Cosine and its like compute from a list of first values, one a group.
            values = getattr(scheduler, 'base_values', None)
            if isinstance(values, list) and len(values) == before:
                name = f'initial_{scheduler.param_name}'
                values.append(groups[-1].get(name, groups[-1].get(scheduler.param_name)))

    def before_train(self, runner: Runner) -> None:
        """After weights were initialised or loaded: inherit, then attach."""
        if self.distiller is None:
            return
        if not self._resumed and self.distiller.inherit:
            self.distiller.inherit_weights()
            print_log(f'kd_mm: the student inherits {list(self.distiller.inherit)} from the teacher', 'current')
        for teacher in self.distiller.teachers.values():
            if isinstance(teacher, EMATeacher) and teacher.share:
                average = next((hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)), None)
                if average is not None:
                    # An EMAHook that is new in the config would start with a copy of the student.
                    new = self._resumed and not self._averaged
                    teacher.use(_unwrap(average.module), fill=new)
                    if new:
                        average.steps.fill_(max(runner.iter, 1))  # at 0 the student is copied
            teacher.start(self._resumed)
        if self.distiller.peers:
            self.distiller.start_peers(runner.cfg.get('optim_wrapper'), _lr_scale(runner))
        self.distiller.attach()
        self.distiller.shares.follow(runner.optim_wrapper.optimizer,
                                     isinstance(runner.train_loop, EpochBasedTrainLoop))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.distiller is not None:
            self.distiller.step = runner.iter
            group = runner.optim_wrapper.optimizer.param_groups[0]
            self._rate = group['lr'] / group['initial_lr'] if group.get('initial_lr') else 1.0
            for peer in self.distiller.peers.values():
                peer.rate = self._rate

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.distiller is not None:
            # With accumulated gradients an iteration is no step: the average and the opponents go with the steps.
            stepped = runner.optim_wrapper.should_update()
            for name, value in self.distiller.after_step(self._rate, stepped).items():
                runner.message_hub.update_scalar(f'train/{name}', value)
            for teacher in self.distiller.teachers.values() if stepped else ():
                teacher.after_step(runner.iter, runner.max_iters)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.distiller is not None:
            self.distiller.shares.end_epoch()

    def after_train(self, runner: Runner) -> None:
        """Leave the student as a stock model."""
        if self.distiller is not None:
            self.distiller.raise_if_not_finite()
            self.distiller.detach()

    def before_save_checkpoint(self, runner: Runner, checkpoint: Dict[str, Any]) -> None:
        """Keep the extras under the side key; the student's ``state_dict`` is not touched."""
        if self.distiller is not None:
            self.distiller.raise_if_not_finite()
            checkpoint[SIDE_KEY] = side_state(self.distiller)
            for name, peer in self.distiller.peers.items():
                peer.save(runner.work_dir, name, checkpoint.get('meta', {}))

    def after_load_checkpoint(self, runner: Runner, checkpoint: Dict[str, Any]) -> None:
        """Restore the extras on a resume."""
        if not runner._resume:
            return
        self._resumed, self._averaged = True, 'ema_state_dict' in checkpoint
        average = checkpoint.get('state_dict', {}) if self._averaged else None
        if self._averaged and any(isinstance(hook, EMAHook) for hook in runner.hooks[:runner.hooks.index(self)]):
            # It has already exchanged the student and its average.
            average = {key[len('module.'):]: value for key, value in checkpoint['ema_state_dict'].items()
                       if key.startswith('module.')}
        side = checkpoint.get(SIDE_KEY)
        if self.distiller is not None:
            restore(self.distiller, side, average)
        elif side is not None or average is not None:
            # val() or test() before train(). A copy: an EMAHook exchanges the values of the dict.
            self._early = side, None if average is None else dict(average)


#: Refusals that training and ``tools/check_config.py`` share, word by word.
SEVERAL_OPTIMIZERS = 'kd_mm.DistillHook needs one optimizer; several (OptimWrapperDict) are not supported'
MULTI_BRANCH = ('kd_mm.DistillHook: multi-branch (semi-supervised) data (MultiBranchDataPreprocessor) are not '
                'supported. Distil the detector inside, on one branch')


def other_runner(name: str) -> str:
    """The refusal of another Runner."""
    return (f'kd_mm.DistillHook works with mmengine.runner.Runner; {name} and its strategies (DeepSpeed, FSDP, '
            'ColossalAI) are not supported. Use a plain Runner')


def listed(count: int) -> str:
    """The refusal of several distillation hooks."""
    return (f'the config lists kd_mm.DistillHook {count} times (custom_hooks and default_hooks together); put all '
            'losses into the `losses` of one')


def multi_branch(model: nn.Module) -> bool:
    """Whether a model takes semi-supervised data, of several branches."""
    kinds = type(getattr(model, 'data_preprocessor', None)).__mro__
    return any(kind.__name__ == 'MultiBranchDataPreprocessor' for kind in kinds)


def one_text(names: str) -> str:
    """The warning about class names that are text."""
    return (f'metainfo=dict(classes={names!r}) of the training data is text, and is taken as one class (or as a '
            f'file of names). A tuple of one name needs a comma: classes=({names!r}, )')


def _is_distillation(entry: Any) -> bool:
    kind = entry.get('type') if isinstance(entry, dict) else None
    return kind is DistillHook or str(kind).split('.')[-1] == DistillHook.__name__


def folder_of(cfg: Any) -> Optional[str]:
    """The folder of a config's file; None if it was made in memory."""
    file = getattr(cfg, 'filename', None)
    return os.path.dirname(os.path.abspath(file)) if file else None


def check_folded(distiller: Distiller, cfg: Any) -> None:
    """Refuse taps inside modules that the Runner is about to flatten (``efficient_conv_bn_eval``).

    Raises:
        ValueError: naming the term and the module.
    """
    folded = cfg.get('efficient_conv_bn_eval') or ()
    for module in [folded] if isinstance(folded, str) else folded:
        for term in distiller.all_terms():
            inside = [path for path in term.student_paths if path.startswith(f'{module}.')]
            if inside:
                raise ValueError(f'{term.name}: efficient_conv_bn_eval flattens {module!r}, so that {inside[0]!r} '
                                 f'is not called as a module any more. Tap {module!r} or what comes after it, or '
                                 'leave the option out')


def check_loop(distiller: Distiller, size: Any, epochs: bool) -> None:
    """Refuse losses on the relations between images where a batch has too few, and weights that wait for an epoch.

    Args:
        distiller: that was built.
        size: images of a process in a batch; None where it is not known.
        epochs: whether the loop has epochs.

    Raises:
        ValueError: naming the terms.
    """
    problems = Problems()
    for fault in distiller.shares.faults(epochs):
        problems.add(fault)
    for term in distiller.all_terms():
        need = term.loss.fewest_images
        if isinstance(size, int) and size < need and not term.shared and any(term.loss.weight.numbers):
            problems.add(f"{term.title}: {type(term.loss).__name__} compares images with each other (samples='image') "
                         f'and needs {need} of them in a process, but train_dataloader.batch_size is {size}: nothing '
                         "would be learned. Use samples='cell', or a larger batch")
    problems.raise_any()


def guesses(distiller: Distiller) -> List[str]:
    """What the distiller found out by itself, as sentences: which files, classes left out, tokens as maps."""
    notes = [f'teacher file {text}' for teacher in distiller.teachers.values() for text in teacher.files]
    for term in distiller.current.terms:
        for source, pairs in term.chosen.items():
            sides = (('student', term.learner), ('teacher', distiller.current.source_of(term, source)))
            for (side, name), (_, chosen) in zip(sides, pairs):
                left = [text for index, text in enumerate(distiller.classes_of(name) or ()) if index not in chosen]
                if left:
                    more = f' and {len(left) - 20} more' if len(left) > 20 else ''
                    notes.append(f'{term.title}: {len(chosen)} classes are compared; of the {side} are left out: '
                                 f'{", ".join(map(str, left[:20]))}{more}')
    notes += distiller.agreement.notes
    notes += [f'tokens as maps: {tap.token_size_note}' for tap in distiller.current.taps.values()
              if tap.token_size_note]
    return list(dict.fromkeys(notes))


def argument_faults(arguments: Mapping[str, Any]) -> Dict[str, str]:
    """What is wrong with arguments of :class:`DistillHook` that only it looks at: name -> sentence."""
    owner = 'kd_mm.DistillHook'
    faults: Dict[str, str] = {}

    def check(name: str, call: Callable[[str, str, Any], Any]) -> None:
        try:
            if name in arguments:
                call(owner, name, arguments[name])
        except ValueError as error:
            faults[name] = str(error)

    check('teacher_strict', boolean)
    check('adapter_lr_mult', from_zero)
    check('adapter_decay_mult', from_zero)
    check('seed', lambda owner, name, value: whole(owner, name, value, None))
    check('inherit', _module_paths)
    check('teachers', _strict_of_each)
    return faults


def _module_paths(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, str) and not (isinstance(value, Collection) and not isinstance(value, Mapping)
                                           and all(isinstance(path, str) for path in value)):
        raise ValueError(f"{owner}: {name}={value!r} must be a list of module paths, such as ('neck', 'bbox_head')")


def _strict_of_each(owner: str, name: str, value: Any) -> None:
    for key, entry in value.items() if hasattr(value, 'items') else ():
        if hasattr(entry, 'get') and 'teacher_strict' in entry:
            boolean(owner, f'{name}[{key!r}].teacher_strict', entry['teacher_strict'])


def _unwrap(model: Any) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _schedulers(runner: Runner) -> List[Any]:
    found = runner.param_schedulers or []
    if isinstance(found, dict):
        found = [scheduler for part in found.values() for scheduler in part]
    return list(found)


def _lr_scale(runner: Runner) -> float:
    """The factor by which the Runner's automatic scaling has multiplied every learning rate."""
    scaling = runner.auto_scale_lr
    if not scaling or not scaling.get('enable', False):
        return 1.0
    batch = _batch_size(runner)
    if batch is None:
        kind = type(runner.train_dataloader.batch_sampler).__name__
        raise ValueError(f'auto_scale_lr: the batch size is not known, neither from the batch sampler ({kind}) nor '
                         'from train_dataloader.batch_size')
    return runner.world_size * batch / scaling['base_batch_size']


def _batch_size(runner: Runner) -> Optional[int]:
    """Images of a process in a step; None where it is not known."""
    loader: Any = runner.train_dataloader
    # A loader with a batch sampler, as in most configs of mmdet, has a batch_size of None.
    size = getattr(loader, 'batch_size', None) or getattr(getattr(loader, 'batch_sampler', None), 'batch_size', None)
    return size if size is not None else (runner.cfg.get('train_dataloader') or {}).get('batch_size')


def _scope(runner: Runner) -> Optional[str]:
    """Name of the student's registry scope: the Runner's, else that of the model's host."""
    name = getattr(runner.default_scope, 'scope_name', None)
    if name in (None, 'mmengine'):  # the Runner's word for none
        return next((host for base in type(_unwrap(runner.model)).__mro__
                     for host in [base.__module__.split('.')[0]] if host in ('mmdet', 'mmseg')), name)
    return name


def _classes(dataset: Any) -> Optional[List[str]]:
    """Class names of the training data, if known."""
    names = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if isinstance(names, str):
        print_log(f'kd_mm: {one_text(names)}', 'current', level=30)
    return as_names(names) if names is not None and len(names) else None


def _describe_dataset(runner: Runner) -> str:
    dataset = runner.train_dataloader.dataset
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return ', '.join(f'{name}={getattr(dataset, name)!r}' for name in ('data_root', 'data_prefix', 'ann_file')
                     if getattr(dataset, name, None)) or type(dataset).__name__
