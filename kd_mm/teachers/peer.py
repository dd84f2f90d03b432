"""Mutual learning: a second student, trained in the same run, that teaches the first and is taught by it."""

import copy
import os
import re
from typing import Any, Dict, List, Optional, Sequence

import torch
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

from kd_mm.hosts.models import build_model, class_names, load_config, task_of
from kd_mm.hosts.optim import in_full_precision, precision, wrapper_class
from kd_mm.hosts.taps import Tap
from kd_mm.ops import distributed
from kd_mm.ops.modes import eval_mode
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.spec import TeacherSpec
from kd_mm.teachers.speed import AUTO, EXACT
from kd_mm.types.batch import KDBatch


class PeerTeacher(Teacher):
    """A second student (Zhang et al., Deep Mutual Learning, CVPR 2018).

    In every step both see the same batch; each minimises its own task loss plus the distillation losses with the other
    as a fixed teacher, ``L_1 = task_1 + KD(1 <- 2)`` and ``L_2 = task_2 + KD(2 <- 1)``.  The peer runs before the
    student, on random numbers of its own, and is updated first, with what both computed before the update.  Its
    checkpoint is a plain one of its own config:
    ``<work_dir>/peer_<name>.pth``, written whenever the student's is.

    Args:
        config: path of a config, ``mmdet::...`` or ``mmseg::...`` name, or a config dict; its pretrained backbone is
            loaded as in a training of its own.
        optim_wrapper: optimizer of the peer; default: the student's. Its learning rate follows the student's schedule,
            in proportion. Loss scaling (float16) is not supported; bfloat16 is.
    """

    def __init__(self, model: nn.Module, student: nn.Module, name: str, classes: Optional[List[str]] = None,
                 optim_wrapper: Any = None):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(model, student, name, classes)
        for parameter in trained:
            parameter.requires_grad_(True)
        self.optim_cfg = optim_wrapper
        self.terms = nn.ModuleDict()
        self.wrapper: Any = None
        self.rate = 1.0
        self._losses: Dict[str, Any] = {}
        self._kept: Optional[Dict[str, Any]] = None

    @classmethod
    def create(cls, spec: TeacherSpec, config: Any, optim_wrapper: Any = None) -> 'PeerTeacher':
        """Build a peer; the spec's checkpoint is where it starts from (None: as its config says)."""
        cfg, name, _ = load_config(config, spec.folder)
        with spec.drawn():
            model = build_model(cfg, spec.scope, pretrained=spec.checkpoint is None)
            if task_of(model) != task_of(spec.student):
                raise ValueError(f'peer {name} is a {task_of(model)} model and the student does '
                                 f'{task_of(spec.student)}')
            model.init_weights()
            notes = spec.load(model, 'peer')
        peer = cls(model, spec.student, name, class_names(cfg), optim_wrapper)
        peer.notes += notes
        return peer

    def go(self, speed: Any) -> None:
        """A peer trains: it runs as the host runs it."""
        super().go(EXACT)
        if speed not in (AUTO, EXACT):
            raise ValueError(f'peer {self.name}: speed={speed!r} is for a teacher that does not train. Leave it out, '
                             f'or give the peer speed={EXACT!r} where it is for the other teachers')

    def look(self, view: Any, input_key: Optional[str] = None) -> None:
        """A peer learns from the same pictures with the same targets."""
        super().look(view, input_key)
        if self.view is not None or input_key is not None:
            raise ValueError(f'peer {self.name}: view and input_key are for a teacher that does not train. Leave them '
                             'out')

    # ------------------------------------------------------------------ its own losses

    def add(self, name: str, term: nn.Module) -> None:
        """Take the mirror of one of the student's losses: its trainable parts are the peer's."""
        self.terms[name] = term

    def start_optimizer(self, student_cfg: Any, max_steps: int, scale: float = 1.0) -> None:
        """Make the optimizer, from its own config or the student's; ``scale`` is that of ``auto_scale_lr``.

        Raises:
            ValueError: there is no config, the optimizer scales losses, or it cannot be built.
        """
        cfg = self.optim_cfg or student_cfg
        if not cfg:
            raise ValueError('PeerTeacher: the Runner was made without a config, so the peer needs an optimizer of its '
                             "own: teacher=dict(type='PeerTeacher', config=..., optim_wrapper=dict(...))")
        if precision(cfg) not in (None, 'bfloat16'):
            raise ValueError(f'PeerTeacher: loss scaling ({wrapper_class(cfg).__name__} in {precision(cfg)}) is not '
                             "supported; use dtype='bfloat16', or give the peer an optim_wrapper of its own")
        try:
            self.wrapper = build_optim_wrapper(self.model, in_full_precision(cfg))
        except Exception as error:  # the registry and the optimizers raise anything
            whose = 'its own optim_wrapper' if self.optim_cfg else "the student's optim_wrapper"
            raise ValueError(f'PeerTeacher: the optimizer of the peer {self.name}, made from {whose}, cannot be built: '
                             f'{type(error).__name__}: {error}') from error
        extras = [parameter for parameter in self.terms.parameters() if parameter.requires_grad]
        if extras:
            self.wrapper.optimizer.add_param_group({'params': extras})
        for group in self.wrapper.optimizer.param_groups:
            group['lr'] = group['lr'] * scale
            group.setdefault('initial_lr', group['lr'])
        self.wrapper.initialize_count_status(self.model, 0, max_steps or -1)
        for module in (self.model, self.terms):
            distributed.broadcast(module)
        if self._kept is not None:
            self.load(self._kept)

    # ------------------------------------------------------------------ a step

    def check_eval(self) -> None:
        """A peer trains; nothing to put back."""

    def run(self, inputs: Tensor, data_samples: Any, taps: Sequence[Tap], batch: KDBatch, full: bool = False) -> None:
        """Its training forward, whose losses :meth:`learn` uses; the dry pass is as any teacher's."""
        if full:
            with eval_mode(self.model):
                super().run(inputs, data_samples, taps, batch, full=True)
            return
        self.runs += 1
        self.model.train()
        images = self.renormalise(inputs, batch)
        for tap in taps:
            tap.arm((images.shape[-2], images.shape[-1]))
        try:
            with torch.enable_grad():
                self._losses = self.model(images, copy.deepcopy(data_samples), mode='loss')
        finally:
            for tap in taps:
                tap.disarm()

    def forget(self) -> None:
        """Drop the losses of a step that was not finished."""
        self._losses = {}

    def task_total(self) -> Tensor:
        """Its own losses of this step, summed, with their graph."""
        return self.model.parse_losses(self._losses)[0]

    def learn(self, losses: Sequence[Tensor], step: int) -> Dict[str, Tensor]:
        """One update of the peer.

        Args:
            losses: what it learns from the student, weighted.
            step: number of the iteration.

        Returns:
            Numbers for the log.
        """
        total, _ = self.model.parse_losses(self._losses)
        task = total.detach()
        total = sum(losses, total)
        self._losses = {}
        # All ranks stop together: one that goes on would wait for the others' gradients for ever.
        ranks = distributed.not_finite(total)
        if ranks:
            where = f' (on rank {", ".join(map(str, ranks))})' if distributed.world_size() > 1 else ''
            raise FloatingPointError(f'the loss of the peer {self.name} is not finite at step {step}{where}')
        for group in self.wrapper.optimizer.param_groups:
            group['lr'] = group['initial_lr'] * self.rate
        # A scope of its own: the student's step may be inside no_sync or an accumulation.
        with torch.autocast(total.device.type, enabled=False):
            self.wrapper.backward(self.wrapper.scale_loss(total))
        if self.wrapper.should_update():
            distributed.average_gradients([parameter for module in (self.model, self.terms)
                                           for parameter in module.parameters() if parameter.requires_grad])
            self.wrapper.step()
            self.wrapper.zero_grad()
        return {'peer_task': task, 'peer_total': total.detach()}

    # ------------------------------------------------------------------ life

    def state(self) -> Dict[str, Any]:
        if self.wrapper is None:
            return {'model': {}}
        return dict(model=dict(self.model.state_dict()), terms=dict(self.terms.state_dict()),
                    optimizer=self.wrapper.state_dict(), count=self.wrapper._inner_count)

    def load(self, state: Dict[str, Any]) -> None:
        if self.wrapper is None:  # a resume loads before the training begins
            self._kept = state
            return
        self.model.load_state_dict(state['model'])
        self.terms.load_state_dict(state['terms'])
        self.wrapper.load_state_dict(state['optimizer'])
        self.wrapper._inner_count = state['count']
        self._kept = None

    def save(self, folder: str, name: str, meta: Dict[str, Any]) -> str:
        """Write the peer's plain checkpoint, the file as a whole or not at all; its path."""
        path = os.path.join(folder, f'peer_{re.sub(r"[^A-Za-z0-9_.-]", "_", name)}.pth')
        state = {key: value.detach().cpu() for key, value in self.model.state_dict().items()}
        kept = {key: value for key, value in meta.items() if key not in ('cfg', 'dataset_meta')}
        kept['dataset_meta'] = dict(classes=list(self.classes)) if self.classes else meta.get('dataset_meta')
        torch.save(dict(meta=kept, state_dict=state), f'{path}.part')
        os.replace(f'{path}.part', path)
        return path
