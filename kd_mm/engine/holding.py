"""Who holds the student: a Runner or a strategy of FlexibleRunner, whole on every rank, in shards, or in an engine.

==================  ==========================================================================================
``Holding``         Runner; FlexibleRunner with SingleDeviceStrategy or DDPStrategy: the student is whole, and its
                    optimizer takes the extras as one more group
``Shards``          FSDPStrategy: every rank has a part of each weight.  What looks at the whole student (the first
                    pass, ``inherit``) looks at a plain twin, which is then dropped; the extras are whole on every rank
                    and have an optimizer of their own
``Engine``          DeepSpeedStrategy with ZeRO-1 or -2: weights are whole, the optimizer is not; the extras have one of
                    their own
==================  ==========================================================================================
"""

import math
import os
from abc import ABC, abstractmethod
from functools import partial
from typing import Any, ContextManager, Dict, List, Mapping, Optional, Tuple

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, find_latest_checkpoint
from torch import Tensor, nn

from kd_mm.engine.attach import HALF
from kd_mm.engine.distiller import Distiller
from kd_mm.engine.extras import OwnOptimizer, add_group, reference_group
from kd_mm.hosts.checkpoint import load_file
from kd_mm.hosts.models import build_model
from kd_mm.hosts.swap import Swap
from kd_mm.ops import distributed
from kd_mm.ops.modes import preserved_random_state
from kd_mm.ops.modulation import GradientShareSchedule
from kd_mm.ops.problems import ConfigProblems
from kd_mm.teachers.ema import EMATeacher

#: Beside the files of a DeepSpeed checkpoint: the plain student, with the side key.
PLAIN_FILE = 'student.pth'


def refusal(runner: str, strategy: Optional[Mapping[str, Any]] = None) -> Optional[str]:
    """Why a Runner or a strategy cannot be distilled in; None if it can.

    Args:
        runner: name of its class.
        strategy: of a FlexibleRunner: ``type`` (name of its class), and ``state_dict_cfg`` or ``zero_optimization``.

    Example:
        >>> refusal('FlexibleRunner', dict(type='DDPStrategy')) is None
        True
        >>> refusal('FlexibleRunner', dict(type='DeepSpeedStrategy', zero_optimization=dict(stage=3)))[:53]
        'kd_mm.DistillHook: ZeRO stage 3 keeps the weights of '
    """
    if runner not in ('Runner', 'FlexibleRunner'):
        return (f'kd_mm.DistillHook works with mmengine.runner.Runner and FlexibleRunner; {runner} is not supported: '
                'how it builds, saves and resumes is not known. Use one of those two')
    strategy = strategy or {}
    kind = strategy.get('type') or 'SingleDeviceStrategy'
    if kind == 'FSDPStrategy':
        form = strategy.get('state_dict_cfg', 'local')
        form = form.get('state_dict_type', 'local') if hasattr(form, 'get') else form
        if 'full' not in str(form).lower():
            return ("kd_mm.DistillHook: FSDPStrategy with state_dict_cfg='local' (its default) saves a piece of every "
                    'weight a rank, which no plain config loads. Give '
                    "strategy=dict(type='FSDPStrategy', state_dict_cfg='full')")
    elif kind == 'DeepSpeedStrategy':
        stage = (strategy.get('zero_optimization') or {}).get('stage', 0)
        if stage >= 3:
            return ('kd_mm.DistillHook: ZeRO stage 3 keeps the weights of a rank in pieces that only the engine puts '
                    "together, so that neither the first pass nor a plain checkpoint can be made. Use stage 1 or 2, or "
                    "strategy=dict(type='FSDPStrategy', state_dict_cfg='full')")
    elif kind not in ('SingleDeviceStrategy', 'DDPStrategy'):
        return (f'kd_mm.DistillHook: {kind} of FlexibleRunner is not supported: it owns model, optimizer and '
                'checkpoint in forms of its own. Use SingleDeviceStrategy, DDPStrategy, FSDPStrategy or '
                'DeepSpeedStrategy')
    return None


def hold(runner: Any) -> 'Holding':
    """Who holds the student of this Runner.

    Raises:
        RuntimeError: one that is not supported; the message says why.
    """
    if isinstance(runner, Runner):
        return Holding(runner)
    strategy = getattr(runner, 'strategy', None)
    names = [base.__name__ for base in type(strategy).__mro__]
    known = (('FSDPStrategy', Shards), ('DeepSpeedStrategy', Engine), ('DDPStrategy', Holding),
             ('SingleDeviceStrategy', Holding))
    name, holding = next(((name, kind) for name, kind in known if name in names), (names[0], Holding))
    given: Dict[str, Any] = dict(type=name)
    if holding is Shards:
        given['state_dict_cfg'] = getattr(strategy, 'state_dict_type', 'local')
    elif holding is Engine:
        given['zero_optimization'] = strategy.config.get('zero_optimization')  # type: ignore[union-attr]
    kinds = [base.__name__ for base in type(runner).__mro__]
    reason = refusal('FlexibleRunner' if 'FlexibleRunner' in kinds else kinds[0], given)
    if reason is not None:
        raise RuntimeError(reason)
    return holding(runner)


class Holding:
    """A student that is whole on every rank, in an optimizer that takes the extras.

    Args:
        runner: a ``Runner`` or a ``FlexibleRunner``, whose model and optimizer are built.
    """

    def __init__(self, runner: Any):
        self.runner = runner
        self.wrapper = runner.model

    @property
    def whole(self) -> nn.Module:
        """The student in the Runner."""
        model: nn.Module = self.wrapper.module if is_model_wrapper(self.wrapper) else self.wrapper
        return model

    @property
    def optimizer(self) -> Any:
        """The optimizer of the student, which has ``param_groups`` and ``defaults``."""
        return self.runner.optim_wrapper.optimizer

    def student(self) -> nn.Module:
        """The model that the distiller is built for."""
        return self.whole

    def faults(self) -> List[str]:
        """What is refused of the Runner, as sentences."""
        return []

    def faults_of(self, distiller: Distiller) -> List[str]:
        """What is refused of a distiller that is built, as sentences."""
        return []

    def settle(self, distiller: Distiller, inherit: bool) -> bool:
        """The distiller is built: let it go over to the student in the Runner. Whether weights were inherited."""
        return False

    def inherit(self, distiller: Distiller) -> bool:
        """The student has its first weights: copy the inherited ones. Whether it was done."""
        distiller.inherit_weights()
        return True

    def take(self, named: Mapping[str, Tensor], options: Dict[str, Any]) -> None:
        """Optimize the extras."""
        add_group(self.optimizer, list(named.values()), options, self.runner.param_schedulers)
        earlier = getattr(self.runner.strategy, _KEPT, None) if hasattr(self.runner, 'strategy') else None
        if earlier is not None:
            delattr(self.runner.strategy, _KEPT)
            self.runner.optim_wrapper.load_state_dict(earlier)

    def side(self) -> Optional[Tuple[Any, Any]]:
        """What a resume has read where the Runner shows it to no hook: the side key, and no average."""
        return None

    def start(self, hook: Any) -> None:
        """The training begins."""

    def before_iter(self) -> None:
        """An iteration begins."""

    def after_iter(self) -> bool:
        """An iteration is over. Whether the optimizer has stepped in it."""
        return bool(self.runner.optim_wrapper.should_update())

    def state(self) -> Optional[Dict[str, Any]]:
        """Of an optimizer that trains the extras alone; None where there is none."""
        return None

    def load(self, state: Optional[Dict[str, Any]]) -> None:
        """Restore :meth:`state`."""

    def close(self) -> None:
        """The Runner is done."""

    def batch_size(self) -> Optional[int]:
        """Images of a process in a step; None where it is not known."""
        loader: Any = self.runner.train_dataloader
        # A loader with a batch sampler, as in most configs of mmdet, has a batch_size of None.
        size = getattr(loader, 'batch_size', None) or getattr(
            getattr(loader, 'batch_sampler', None), 'batch_size', None)
        return size if size is not None else (self.runner.cfg.get('train_dataloader') or {}).get('batch_size')

    def lr_scale(self) -> float:
        """The factor by which the automatic scaling has multiplied every learning rate.

        Raises:
            ValueError: it depends on the batch size, which nobody knows.
        """
        runner = self.runner
        scaling = runner.auto_scale_lr if isinstance(runner, Runner) else runner._auto_scale_lr
        if not scaling or not scaling.get('enable', False):
            return 1.0
        batch = self.batch_size()
        if batch is None:
            kind = type(runner.train_dataloader.batch_sampler).__name__
            raise ConfigProblems(f'auto_scale_lr: the batch size is not known, neither from the batch sampler ({kind}) '
                                 'nor from train_dataloader.batch_size')
        return float(runner.world_size * batch / scaling['base_batch_size'])


class Beside(Holding, ABC):
    """What Shards and Engine share: the extras have an optimizer of their own."""

    #: word for messages
    word = ''
    own: Optional[OwnOptimizer] = None
    twin: Optional[nn.Module] = None
    _scale = 1.0

    def faults(self) -> List[str]:
        cfg = self.runner.cfg
        wrapper = cfg.get('optim_wrapper')
        return [] if cfg.get('model') and hasattr(wrapper, 'get') and wrapper.get('optimizer') else [
            f'kd_mm.DistillHook: with {self.word} the optimizer of the extras, and the twin of the student for the '
            'first pass, are made from the config, and this Runner has none with model and optim_wrapper.optimizer. '
            'Use FlexibleRunner.from_cfg(cfg)']

    def plain_twin(self, state: Mapping[str, Tensor]) -> nn.Module:
        """A plain student in full precision with these weights."""
        with preserved_random_state(0):
            twin: nn.Module = build_model(self.runner.cfg, getattr(self.runner.default_scope, 'scope_name', None))
        twin.load_state_dict(state)
        self.twin = twin.to(next(self.wrapper.parameters()).device).train(self.whole.training)
        return self.twin

    def settle(self, distiller: Distiller, inherit: bool) -> bool:
        if self.twin is not None:
            distiller.move(self.whole)
            self.twin = None
        return False

    def faults_of(self, distiller: Distiller) -> List[str]:
        return [f'{term.title}: GradientShareSchedule looks at the gradients that the optimizer gets, of which a rank '
                f'has a part only with {self.word}. Use another schedule, or a Runner'
                for term in distiller.current.terms if isinstance(term.loss.weight.schedule, GradientShareSchedule)]

    def take(self, named: Mapping[str, Tensor], options: Dict[str, Any]) -> None:
        cfg = self.runner.cfg.optim_wrapper.optimizer
        self.own = OwnOptimizer({key: value for key, value in cfg.items() if key != 'params'}, list(named.values()),
                                options, lambda: reference_group(self.optimizer), self._clip())

    def _clip(self) -> Any:
        return None

    def before_iter(self) -> None:
        self._scale = self._loss_scale()

    def after_iter(self) -> bool:
        stepped = self._stepped()
        if stepped and self.own is not None:
            self.own.step(self._scale)
        return stepped

    def _stepped(self) -> bool:
        return super().after_iter()

    @abstractmethod
    def _loss_scale(self) -> float:
        """By which the losses of this iteration are multiplied."""

    def state(self) -> Optional[Dict[str, Any]]:
        return None if self.own is None else self.own.state()

    def load(self, state: Optional[Dict[str, Any]]) -> None:
        if self.own is not None and state is None:
            raise ConfigProblems('the checkpoint to resume from does not have the state of the optimizer that '
                                 f'{self.word} needs for the extras. Resume with the strategy it was written by')
        if self.own is not None and state is not None:
            self.own.load(state)


class Shards(Beside):
    """A student in shards (FullyShardedDataParallel)."""

    word = 'FSDPStrategy'

    def faults_of(self, distiller: Distiller) -> List[str]:
        found = super().faults_of(distiller)
        found += [f'teacher {name!r}: EMATeacher averages the whole student after every step, and with FSDPStrategy no '
                  'rank has it. Use DDPStrategy, or a fixed teacher'
                  for name, teacher in distiller.teachers.items() if isinstance(teacher, EMATeacher)]
        if distiller.leaves_out:
            found.append("task_classes='new' exchanges a method of the student's head, which FSDPStrategy may have "
                         'wrapped. Use DDPStrategy')
        found += [f"{term.title}: loss_weight='auto' measures gradients in the middle of a step, and FSDP's own hooks "
                  'take that for the backward pass. Give a number or a schedule'
                  for term in distiller.current.terms if term.loss.weight.auto is not None]
        return found

    def _full(self) -> ContextManager[Any]:
        """Inside, the state dict of the wrapper is that of the whole student, on every rank."""
        from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
        return FullyShardedDataParallel.state_dict_type(
            self.wrapper, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False))

    def student(self) -> nn.Module:
        with self._full():
            return self.plain_twin(self.wrapper.state_dict())

    def settle(self, distiller: Distiller, inherit: bool) -> bool:
        inherit = inherit and bool(distiller.inherit)
        if inherit:
            self._inherit(distiller)
        super().settle(distiller, inherit)
        # Units whose outputs count nothing are not put together for the backward pass, which the taps in them need.
        distiller.may_skip = False
        # A look at single gradients would be taken for the backward pass; the first pass has proven every term.
        distiller.watch.proven.update((term.learner, term.name) for term in distiller.current.terms)
        if getattr(self.runner.optim_wrapper, 'clip_grad_kwargs', None):
            print_log('kd_mm: under FSDPStrategy mmengine clips by the norm of the shards of each rank; the extras are '
                      'clipped by their own norm, the same on every rank', 'current', level=30)
        return inherit

    def _inherit(self, distiller: Distiller) -> None:
        assert self.twin is not None
        distiller.inherit_weights(self.twin)
        with self._full():
            self.wrapper.load_state_dict(self.twin.state_dict())

    def inherit(self, distiller: Distiller) -> bool:
        return False  # settle() has done it

    def _clip(self) -> Any:
        wrapper = self.runner.optim_wrapper
        options = getattr(wrapper, 'clip_grad_kwargs', None)
        return partial(wrapper.clip_func, **options) if options else None

    def _loss_scale(self) -> float:
        scaler = getattr(self.runner.optim_wrapper, 'loss_scaler', None)
        return float(scaler.get_scale()) if scaler is not None else 1.0


class Engine(Beside):
    """A student in a DeepSpeed engine with ZeRO-0, -1 or -2."""

    word = 'DeepSpeedStrategy'
    _swap: Optional[Swap] = None

    @property
    def engine(self) -> Any:
        return self.wrapper.model

    @property
    def optimizer(self) -> Any:
        outer = self.runner.optim_wrapper.optimizer
        return getattr(outer, 'optimizer', outer)  # the wrapped one has the defaults and the same groups

    def faults_of(self, distiller: Distiller) -> List[str]:
        found = super().faults_of(distiller)
        found += [f'teacher {name!r}: a peer is optimized as the student is, and DeepSpeedOptimWrapper belongs to the '
                  "engine. Give the peer its own: teacher=dict(type='PeerTeacher', config=..., optim_wrapper=dict(...))"
                  for name, peer in distiller.peers.items() if not peer.optim_cfg]
        half = self._half
        found += [f'teacher {name!r}: EMATeacher averages the weights of the student, which DeepSpeed keeps in half '
                  'precision here; small steps are lost there. Use fp32, or a fixed teacher'
                  for name, teacher in distiller.teachers.items() if half and isinstance(teacher, EMATeacher)]
        return found

    @property
    def _half(self) -> bool:
        return next(self.whole.parameters()).dtype in HALF

    def student(self) -> nn.Module:
        # The first pass goes backward, which the engine would take for a step, and needs full precision.
        return self.plain_twin(self.whole.state_dict())

    def inherit(self, distiller: Distiller) -> bool:
        distiller.inherit_weights()
        # The engine has copied the weights when it was made, and would write its copy back.
        refresh = getattr(self.runner.optim_wrapper.optimizer, 'refresh_fp32_params', None)
        if refresh is not None:
            refresh()
        return True

    def lr_scale(self) -> float:
        return 1.0  # this strategy scales no learning rate

    def _clip(self) -> Any:
        limit = float(self.engine.gradient_clipping() or 0)
        return partial(torch.nn.utils.clip_grad_norm_, max_norm=limit) if limit else None

    def _loss_scale(self) -> float:
        scale = float(getattr(self.runner.optim_wrapper.optimizer, 'cur_scale', 1.0) or 1.0)
        return scale if math.isfinite(scale) else 1.0

    def _stepped(self) -> bool:
        return bool(self.engine.micro_steps % self.engine.gradient_accumulation_steps() == 0)

    # ------------------------------------------------------------------ checkpoints, which the strategy shows no hook

    def side(self) -> Optional[Tuple[Any, Any]]:
        runner = self.runner
        if not runner._resume or not runner._has_loaded:
            return None
        path = runner._resume if isinstance(runner._resume, str) else \
            runner._load_from or find_latest_checkpoint(runner.work_dir)
        path = os.path.join(path, PLAIN_FILE)
        if not os.path.isfile(path):
            raise ConfigProblems(f'the checkpoint to resume from has no {PLAIN_FILE} (looked at {path}), where the '
                                 'extras are. Resume from one that was written with this hook, or start with load_from')
        return load_file(path).get('kd_mm'), None

    def start(self, hook: Any) -> None:
        strategy = self.runner.strategy
        original = strategy.save_checkpoint

        def save_checkpoint(filename: str, *, save_optimizer: bool = True, extra_ckpt: Optional[dict] = None,
                            **options: Any) -> None:
            extra: Dict[str, Any] = {} if extra_ckpt is None else extra_ckpt
            hook.before_save_checkpoint(self.runner, extra)
            side = extra if not save_optimizer else {key: extra.pop(key) for key in ['kd_mm'] if key in extra}
            original(filename, save_optimizer=save_optimizer, extra_ckpt=extra, **options)
            if save_optimizer and distributed.rank() == 0:
                self._save_plain(filename, dict(side, meta=extra.get('meta', {})))

        self._swap = Swap(strategy, 'save_checkpoint', save_checkpoint).on()

    def _save_plain(self, folder: str, content: Dict[str, Any]) -> None:
        state = {key: value.detach().cpu() for key, value in self.whole.state_dict().items()}
        path = os.path.join(folder, PLAIN_FILE)
        torch.save(dict(content, state_dict=state), f'{path}.part')
        os.replace(f'{path}.part', path)

    def close(self) -> None:
        if self._swap is not None:
            self._swap.off()
            self._swap = None


# ---------------------------------------------------------------------- resuming before there is a distiller

#: Attribute of a strategy: the state of the optimizer with the extras, until these are in it.
_KEPT = '_kd_mm_optimizer'


def before_loading(runner: Any, checkpoint: Dict[str, Any]) -> None:
    """A checkpoint is about to be put back, by a Runner that does so before it calls ``before_run``.

    The extras are not in the optimizer yet, so that its state is put back without them, and whole when they are.
    """
    if isinstance(runner, Runner):
        return
    strategy = runner.strategy
    if 'FSDPStrategy' in [base.__name__ for base in type(strategy).__mro__]:
        _mend_order(strategy)
        return
    saved = checkpoint.get('optimizer')
    optimizer = getattr(getattr(strategy, 'optim_wrapper', None), 'optimizer', None)
    if not saved or optimizer is None or len(saved['param_groups']) != len(optimizer.param_groups) + 1:
        return
    setattr(strategy, _KEPT, saved)
    groups = saved['param_groups'][:-1]
    kept = {index for group in groups for index in group['params']}
    checkpoint['optimizer'] = dict(
        saved, param_groups=groups, state={key: value for key, value in saved['state'].items() if key in kept})


def _mend_order(strategy: Any) -> None:
    """mmengine 0.10.7 gives the three arguments of ``optim_state_dict_to_load`` in the order of torch 2.0."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def load_optim_state_dict(state_dict: Dict[str, Any]) -> None:
        optim_wrapper = strategy.optim_wrapper
        optim_wrapper.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(
            model=strategy.model, optim=optim_wrapper.optimizer, optim_state_dict=state_dict))

    Swap(strategy, 'load_optim_state_dict', load_optim_state_dict).on()
