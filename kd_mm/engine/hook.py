"""Runner life cycle <-> Distiller; with ``holding.py`` the only file that knows the Runner."""

import logging
import os
from typing import Any, Dict, List, Mapping, Optional

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from kd_mm.engine.arguments import argument_faults
from kd_mm.engine.branches import Branches, branch_faults, check_branches
from kd_mm.engine.conditions import check_folded, check_loop, unfit
from kd_mm.engine.distiller import Distiller
from kd_mm.engine.extras import group_options
from kd_mm.engine.holding import Holding, before_loading, hold
from kd_mm.engine.resume import SIDE_KEY, restore, side_state
from kd_mm.engine.score import Scores
from kd_mm.engine.sharding import shard_teachers
from kd_mm.engine.term import STUDENT
from kd_mm.engine.trial import wish
from kd_mm.engine.watch import Course
from kd_mm.hosts.checkpoint import allow_mmengine_checkpoints
from kd_mm.hosts.files import settle
from kd_mm.hosts.models import as_names, classes_of
from kd_mm.hosts.own_loss import ALL
from kd_mm.hosts.packages import PARTS, missing
from kd_mm.hosts.pictures import ImageFolder
from kd_mm.hosts.semi import BRANCHES, inner_student, is_semi, labelled_sample
from kd_mm.hosts.table import host_of, host_of_scope
from kd_mm.hosts.versions import require
from kd_mm.ops.classes import flat
from kd_mm.ops.modes import preserved_random_state
from kd_mm.ops.problems import ConfigProblems, Problems
from kd_mm.registry import HOOKS
from kd_mm.teachers.beside import first_problem
from kd_mm.teachers.ema import EMATeacher
from kd_mm.teachers.speed import AUTO
from kd_mm.types.targets import NO_MASKS


@HOOKS.register_module()
class DistillHook(Hook):
    """Distils a teacher into the model that the Runner trains.

    Add it to ``custom_hooks`` of any config of a host (mmdet, mmseg, ...)::

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
            speed=..., view=..., input_key=..., classes=...)``; each loss then says ``teacher='name'``, or names
            several whose outputs are averaged. Default none.
        inherit: student modules that start from the teacher's weights, such as ``('neck', 'bbox_head')``, or path ->
            how: ``dict(neck='copy', bbox_head='grow')`` for a head with more classes than the teacher's, see
            :func:`kd_mm.hosts.growing.grow_head`. Default none.
        task_loss_weight: factor on the student's own losses; 0 trains from the teacher alone. Default 1.
        task_classes: which classes the student's own classification loss teaches: ``'all'`` (default) or ``'new'``,
            those that the teacher does not know. For one-stage detectors with sigmoid scores whose classes grow.
        adapter_lr_mult: learning rate of the trainable extras as a multiple of the base learning rate. Default 1.
        adapter_decay_mult: their weight decay as a multiple of the base weight decay. Default 1.
        seed: of the initial adapters and of random masks. Default 0.
        speed: in which form the teacher runs. ``'auto'`` (default): the fastest that a fixed rule knows for the model
            and the device and that keeps every tap within 1e-4 of the exact forward on the first batch; the log says
            what was taken. ``'exact'``: the host's own forward, bit for bit. ``'tune'``: forms are tried in the first
            steps and the fastest is kept. Or a dict of what is wanted, see
            :class:`kd_mm.teachers.speed.Speed`, for example ``dict(fold=True, precision='bf16')``.
        agreement: every so many iterations, and in the first and the last one, the log says how alike student and
            teacher are at the taps of each loss (``kd_agree_<name>``, see :class:`kd_mm.engine.likeness.Likeness`); a
            training of less than ten times as many is measured about ten times. Default 50, as often as the hosts
            log; 0 for never. It changes nothing of the training.
        score_teacher: whether the teachers are evaluated before the first step, in the config's own validation: the
            scores stand in the log beside those of the student (``teacher_mIoU``), and a student that is as good as
            its teacher is said. A number N: on the first N images alone; ``dict(images=N, seed=S)``: on N others. After
            each validation the student is evaluated on the same ones (``student_mIoU``). A resumed training takes the
            score from its checkpoint. Default False; ``kd-mm distill`` does it by itself.
        shard_teacher: with several processes, whether each keeps only its share of the teachers' weights and gets the
            others' when a part runs: less memory, more messages. Such a teacher runs in its exact form. Default False:
            every process has the whole teacher.
        view: at which size the teacher sees the batch: ``dict(scale=0.5, multiple_of=16)`` or ``dict(size=(H, W))``,
            see :class:`kd_mm.teachers.view.View`; its taps are brought to the student's grid. Default: the student's.
        input_key: name of a field in the ``metainfo`` of the samples that the teacher is shown instead of the student's
            pictures, such as infrared or depth, see :mod:`kd_mm.teachers.beside`. Default none.
        classes: which classes of the teacher are which of the student's, where a loss on logits or ``labels`` does not
            say it: ``'common'`` (by name; spellings of COCO and VOC are known), ``'positional'``, a list of names, or a
            dict from classes of the teacher to those of the student, see :func:`kd_mm.ops.classes.map_classes`.
            Default none.
        labels: what teachers add to the labels before the student sees them: ``dict(type='PseudoLabels', score=0.7)``,
            or several by name, see :class:`kd_mm.teachers.labels.base.Labeller`. Default none.
        branches: of a semi-supervised detector of mmdet (SoftTeacher), whose inner student is distilled: ``'sup'``
            (labelled images), ``'unsup'`` (unlabelled ones) or both. Default both.

    Raises:
        ImportError: a version of torch, mmengine, mmcv or a host that kd_mm does not work with.
        ValueError: (before the first step) the configuration is wrong; all problems in one message.
        RuntimeError: (before the first step) a Runner or optimizer that is not supported.
    """

    # Before EMAHook and CheckpointHook: a non-finite loss must stop training before anything is saved.
    priority = 'ABOVE_NORMAL'

    def __init__(self, teacher: Any = None, losses: Any = None, teacher_ckpt: Optional[str] = None,
                 teacher_strict: bool = True, teachers: Any = None, inherit: Any = (),
                 task_loss_weight: float = 1.0, task_classes: str = ALL, adapter_lr_mult: float = 1.0,
                 adapter_decay_mult: float = 1.0, seed: int = 0, speed: Any = AUTO, agreement: int = 50,
                 score_teacher: Any = False, shard_teacher: bool = False, view: Any = None,
                 input_key: Optional[str] = None, classes: Any = None, labels: Any = None, branches: Any = None):
        require()
        problems = Problems()
        for fault in argument_faults(dict(
                teacher_strict=teacher_strict, teachers=teachers, inherit=inherit, adapter_lr_mult=adapter_lr_mult,
                adapter_decay_mult=adapter_decay_mult, seed=seed, agreement=agreement,
                score_teacher=score_teacher, shard_teacher=shard_teacher, branches=branches)).values():
            problems.add(fault)
        problems.raise_any()
        self.config: Dict[str, Any] = dict(
            teacher=teacher, losses=losses, teacher_ckpt=teacher_ckpt, teacher_strict=teacher_strict,
            teachers=teachers, inherit=inherit, task_loss_weight=task_loss_weight, task_classes=task_classes,
            seed=seed, speed=speed, agreement=agreement, view=view, input_key=input_key, class_map=classes,
            labels=labels)
        self.adapter_lr_mult, self.adapter_decay_mult = adapter_lr_mult, adapter_decay_mult
        asked = wish('kd_mm.DistillHook', 'score_teacher', score_teacher)
        self.scores: Optional[Scores] = None if asked is None else Scores(asked, _weights_of(self.config))
        self.shard_teacher = shard_teacher
        self.branches = None if branches is None else check_branches('kd_mm.DistillHook', 'branches', branches)
        self.distiller: Optional[Distiller] = None
        self.holding: Optional[Holding] = None
        self.course = Course()
        self._resumed = False  # from a checkpoint; `resume=True` in an empty work dir is a fresh start
        self._averaged = False  # whether that checkpoint has an EMAHook's average
        self._early: Any = None  # what was loaded before there was a distiller
        self._rate = 1.0  # the student's learning rate as a fraction of its first one
        # Here and not later: the host resumes from its own checkpoint before any other method of ours is called.
        allow_mmengine_checkpoints()

    def before_run(self, runner: Runner) -> None:
        """Build and check everything, and give the extras to the optimizer (training only)."""
        holding = hold(runner)
        # before_run fires for val() and test() too, before and after training, and then there is nothing to build.
        if self.distiller is not None or not self._trains(runner):
            return
        count = sum(isinstance(hook, DistillHook) for hook in runner.hooks)
        if count > 1:
            raise ConfigProblems(listed(count))
        if isinstance(runner.optim_wrapper, OptimWrapperDict):
            raise RuntimeError(SEVERAL_OPTIMIZERS)
        semi = is_semi(_unwrap(runner.model))
        refused = unfit(_unwrap(runner.model))
        if refused is not None:
            raise ConfigProblems(refused)
        if self.scores is not None and runner.val_loop is None:
            raise ConfigProblems('kd_mm.DistillHook: score_teacher evaluates the teacher in the validation of the '
                                 'config, which has none (val_dataloader, val_evaluator, val_cfg). Add it, or leave '
                                 'score_teacher out')
        dataset = runner.train_dataloader.dataset
        if hasattr(dataset, '__len__') and len(dataset) == 0:
            raise ConfigProblems(f'the training data set is empty: {_describe_dataset(runner)}. Check data_root and '
                                 'data_prefix, for example with --cfg-options train_dataloader.dataset.data_root=PATH')
        problems = Problems()
        for fault in [*holding.faults(), *missing({part: runner.cfg.get(part) for part in PARTS})]:
            problems.add(fault)
        problems.raise_any()
        student = inner_student(holding.student())
        self.distiller = Distiller(
            student, classes=_classes(dataset), scope=_scope(runner), max_steps=runner.max_iters,
            folder=folder_of(runner.cfg), **self.config)
        for fault in holding.faults_of(self.distiller):
            problems.add(fault)
        if semi:
            if type(holding) is not Holding:
                problems.add(f'kd_mm.DistillHook: {type(_unwrap(runner.model)).__name__} is supported on one device '
                             'and with DDP, not with FSDP or DeepSpeed')
            self.distiller.branches = Branches(_unwrap(runner.model), self.branches or tuple(BRANCHES))
            self.distiller.may_skip = False  # its losses are those of the branches
        for fault in branch_faults(_unwrap(runner.model), self.distiller, self.branches):
            problems.add(fault)
        problems.raise_any()
        check_folded(self.distiller, runner.cfg)
        check_fields(self.distiller, dataset)
        self.distiller.labelling.check_data(dataset)
        check_loop(self.distiller, holding.batch_size(), isinstance(runner.train_loop, EpochBasedTrainLoop))
        entries = [*(runner.cfg.get('custom_hooks') or ()), *(runner.cfg.get('default_hooks') or {}).values()]
        if any(settle(entry, folder_of(runner.cfg)) for entry in entries if _is_distillation(entry)):
            runner.dump_config()  # again: beside the copy in the work dir they are not
        if self.shard_teacher:
            given = self.config['teachers'] or {}
            speeds = {name: given.get(name, {}).get('speed', self.config['speed'])
                      for name in self.distiller.teachers}
            for note in shard_teachers(self.distiller, speeds):
                print_log(f'kd_mm: {note}', 'current')
        found = holding.side()
        self._resumed = self._resumed or found is not None
        if holding.settle(self.distiller, inherit=not self._resumed):
            self._say_inherited()
        self.holding = holding
        if is_model_wrapper(runner.model):
            self.distiller.follow(runner.model)
        for teacher in self.distiller.teachers.values():
            for note in teacher.notes:
                print_log(note, 'current', level=30)
        for note in guesses(self.distiller):
            print_log(f'kd_mm: {note}', 'current')
        self._add_parameters(runner)
        if self._resumed:
            side, average = self._early or found or (None, None)
            self._restore(side, average)
            holding.load((side or {}).get(OPTIMIZER))
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
        assert self.holding is not None
        self.holding.take(named, group_options(
            self.holding.optimizer, list(named), self.holding.lr_scale(), self.adapter_lr_mult,
            self.adapter_decay_mult))

    def _say_inherited(self) -> None:
        assert self.distiller is not None
        print_log(f'kd_mm: the student inherits {list(self.distiller.inherit)} from the teacher', 'current')
        for note in self.distiller.grown:
            print_log(f'kd_mm: {note}', 'current')

    def before_train(self, runner: Runner) -> None:
        """After weights were initialised or loaded: inherit, then attach."""
        if self.distiller is None:
            return
        assert self.holding is not None
        if not self._resumed and self.distiller.inherit and self.holding.inherit(self.distiller):
            self._say_inherited()
        for teacher in self.distiller.teachers.values():
            if isinstance(teacher, EMATeacher) and teacher.shares:
                average = next((hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)), None)
                if average is not None:
                    # An EMAHook that is new in the config would start with a copy of the student.
                    new = self._resumed and not self._averaged
                    teacher.use(inner_student(_unwrap(average.module)), fill=new)
                    if new:
                        average.steps.fill_(max(runner.iter, 1))  # at 0 the student is copied
            teacher.start(self._resumed)
        if self.distiller.peers:
            self.distiller.start_peers(runner.cfg.get('optim_wrapper'), self.holding.lr_scale())
        if self.scores is not None:
            for name, value in self.scores.measure(self.distiller, runner).items():
                runner.message_hub.update_scalar(f'val/{name}', value)
        self.distiller.attach()
        self.holding.start(self)
        self.distiller.shares.follow(self.holding.optimizer, isinstance(runner.train_loop, EpochBasedTrainLoop))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.distiller is not None and self.holding is not None:
            self.holding.before_iter()
            self.distiller.step = runner.iter
            group = runner.optim_wrapper.optimizer.param_groups[0]
            self._rate = group['lr'] / group['initial_lr'] if group.get('initial_lr') else 1.0
            for peer in self.distiller.peers.values():
                peer.rate = self._rate

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.distiller is not None and self.holding is not None:
            # With accumulated gradients an iteration is no step: the average and the opponents go with the steps.
            stepped = self.holding.after_iter()
            for name, value in self.distiller.after_step(self._rate, stepped).items():
                runner.message_hub.update_scalar(f'train/{name}', value)
            for teacher in self.distiller.teachers.values() if stepped else ():
                teacher.after_step(runner.iter, runner.max_iters)
            own = {term.name: term.label for term in self.distiller.current.terms if term.learner == STUDENT}
            for sentence in self.course.after_iter(runner.message_hub.log_scalars, own):
                print_log(f'kd_mm: {sentence}', 'current', logging.WARNING)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.distiller is not None:
            self.distiller.shares.end_epoch()

    def after_val_epoch(self, runner: Runner, metrics: Optional[Dict[str, float]] = None) -> None:
        """Compare the student with its teachers, where these were scored."""
        if self.scores is not None and self.distiller is not None:
            for name, value in self.scores.after_validation(runner, metrics).items():
                runner.message_hub.update_scalar(f'val/{name}', value)

    def after_run(self, runner: Runner) -> None:
        if self.holding is not None:
            self.holding.close()

    def after_train(self, runner: Runner) -> None:
        """Leave the student as a stock model."""
        if self.distiller is not None:
            self.distiller.raise_if_not_finite()
            self.distiller.detach()
            if isinstance(runner.train_dataloader.dataset, ImageFolder):
                return  # no training without this hook has pictures alone
            print_log('kd_mm: whether it helped is seen beside a training of the same config and seed without this '
                      f'hook: kd-mm compare WORK_DIR_WITHOUT {runner.work_dir}. Stock tools and inference take what '
                      'kd-mm export CHECKPOINT student.pth writes', 'current')

    def before_save_checkpoint(self, runner: Runner, checkpoint: Dict[str, Any]) -> None:
        """Keep the extras under the side key; the student's ``state_dict`` is not touched."""
        if self.distiller is not None:
            self.distiller.raise_if_not_finite()
            checkpoint[SIDE_KEY] = side_state(self.distiller)
            if self.holding is not None and self.holding.state() is not None:
                checkpoint[SIDE_KEY][OPTIMIZER] = self.holding.state()
            if self.scores is not None and self.scores.state():
                checkpoint[SIDE_KEY]['scores'] = self.scores.state()
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
        before_loading(runner, checkpoint)
        if self.distiller is not None:
            self._restore(side, average)
        elif side is not None or average is not None:
            # val() or test() before train(). A copy: an EMAHook exchanges the values of the dict.
            self._early = side, None if average is None else dict(average)

    def _restore(self, side: Any, average: Any) -> None:
        """Put back what the checkpoint to resume from has of the extras, and the scores of the teachers."""
        assert self.distiller is not None
        restore(self.distiller, side, average)
        if self.scores is not None:
            self.scores.load((side or {}).get('scores'))


#: Where the side key keeps the state of an optimizer that trains the extras alone.
OPTIMIZER = 'optimizer'
#: Refusals that training and ``tools/check_config.py`` share, word by word.
SEVERAL_OPTIMIZERS = 'kd_mm.DistillHook needs one optimizer; several (OptimWrapperDict) are not supported'


def listed(count: int) -> str:
    """The refusal of several distillation hooks."""
    return (f'the config lists kd_mm.DistillHook {count} times (custom_hooks and default_hooks together); put all '
            'losses into the `losses` of one')


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


def check_fields(distiller: Distiller, dataset: Any) -> None:
    """Refuse data without what the random images of the first pass have and a term or a teacher needs, by the first
    sample: the field of ``input_key``, instance masks.

    Raises:
        ValueError: naming teacher and field, or terms.
    """
    teachers = [teacher for teacher in distiller.teachers.values() if teacher.input_key is not None]
    terms = [term for term in distiller.all_terms() if term.region is not None and term.region.needs_masks]
    if not teachers and not terms or not hasattr(dataset, '__getitem__'):
        return
    with preserved_random_state():
        sample = labelled_sample(dataset[0]['data_samples'])
    problem = first_problem(teachers, sample) if teachers else None
    if problem is None and terms and 'masks' not in getattr(sample, 'gt_instances', ()):
        problem = f'{", ".join(term.title for term in terms)}: {NO_MASKS}'
    if problem is not None:
        raise ConfigProblems(problem)


def guesses(distiller: Distiller) -> List[str]:
    """What the distiller found out by itself, as sentences: which files, classes left out, tokens as maps."""
    notes = [f'teacher file {text}' for teacher in distiller.teachers.values() for text in teacher.files]
    for term in distiller.current.terms:
        for source, (ours, theirs) in term.chosen.items():
            sides = (('student', term.learner), ('teacher', distiller.current.source_of(term, source)))
            for (side, name), used in zip(sides, (ours[1], flat(theirs[1]))):
                left = [text for index, text in enumerate(distiller.classes_of(name) or ()) if index not in used]
                if left:
                    more = f' and {len(left) - 20} more' if len(left) > 20 else ''
                    notes.append(f'{term.title}: {len(used)} classes are compared; of the {side} are left out: '
                                 f'{", ".join(map(str, left[:20]))}{more}')
    notes += [*distiller.agreement.notes, *distiller.labelling.notes]
    notes += [f'tokens as maps: {tap.token_size_note}' for tap in distiller.current.taps.values()
              if tap.token_size_note]
    return list(dict.fromkeys(notes))


def _weights_of(config: Mapping[str, Any]) -> str:
    """Where the weights of the teachers come from, as far as a config says it."""
    several = config['teachers'] if hasattr(config['teachers'], 'items') else {'': config}
    return '; '.join(f'{name} {entry.get("teacher_ckpt")}' for name, entry in several.items() if hasattr(entry, 'get'))


def _unwrap(model: Any) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _scope(runner: Runner) -> Optional[str]:
    """Name of the student's registry scope: the Runner's, else that of the model's host."""
    name = getattr(runner.default_scope, 'scope_name', None)
    host = host_of(_unwrap(runner.model))
    if name in (None, 'mmengine'):  # the Runner's word for none
        return name if host is None else host.scope
    found = None if host is None else host_of_scope(str(name), type(_unwrap(runner.model)))
    if found is not None and found.note is not None:
        print_log(f'kd_mm: {found.note}', 'current')
    return name


def _classes(dataset: Any) -> Optional[List[str]]:
    """Class names of the training data, if known."""
    metainfo = getattr(dataset, 'metainfo', None)
    names = classes_of(metainfo)
    if isinstance(metainfo, (list, tuple)) and names is None:  # of mmdet's ConcatDataset
        print_log('kd_mm: the data sets that are joined have different classes, so class names are not compared with '
                  "those of a teacher", 'current', level=30)
    if isinstance(names, str):
        print_log(f'kd_mm: {one_text(names)}', 'current', level=30)
    return as_names(names) if names is not None else None


def _describe_dataset(runner: Runner) -> str:
    dataset = runner.train_dataloader.dataset
    while hasattr(dataset, 'dataset') or getattr(dataset, 'datasets', None):
        dataset = dataset.dataset if hasattr(dataset, 'dataset') else dataset.datasets[0]
    return ', '.join(f'{name}={getattr(dataset, name)!r}' for name in ('data_root', 'data_prefix', 'ann_file')
                     if getattr(dataset, name, None)) or type(dataset).__name__
