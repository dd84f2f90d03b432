"""The teacher: resolve its config, load its weights strictly, freeze it, feed it what it expects, run just far enough.

A :class:`Teacher` is no ``nn.Module`` and never a sub-module of one, so that nothing initialises, saves, averages or
broadcasts it by accident.
"""

import dataclasses
import os
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from kd_mm.hosts import checkpoint as ckpt
from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.models import build_model, class_names, default_weights, load_config, task_of
from kd_mm.hosts.samples import samples_seen
from kd_mm.hosts.synthetic import input_channels
from kd_mm.hosts.taps import StopForward, Tap
from kd_mm.ops.functional import resize
from kd_mm.teachers.beside import pictures_beside
from kd_mm.teachers.fast import Fast
from kd_mm.teachers.preprocess import _LUMA, Normalisation
from kd_mm.teachers.shared import Shared
from kd_mm.teachers.spec import TeacherSpec
from kd_mm.teachers.speed import EXACT, speed_of
from kd_mm.teachers.view import View, view_of
from kd_mm.types import targets
from kd_mm.types.batch import KDBatch
from kd_mm.types.records import Recorded


class Teacher:
    """A frozen model in eval mode that is fed its own normalisation and stops after the last tap.

    Args:
        model: the network; every parameter is frozen and every module put into eval mode.
        student: the student, whose data preprocessor made the batches.
        name: for messages.
        classes: class names, if known.
        input_key: see :meth:`look`; where it is given, the channels of the student's pictures do not matter.
    """

    def __init__(self, model: nn.Module, student: nn.Module, name: str = 'teacher',
                 classes: Optional[List[str]] = None, input_key: Optional[str] = None):
        self.model: Any = model
        self.name, self.classes = name, classes
        self.notes: List[str] = []
        #: which files relative paths turned out to be, as sentences
        self.files: List[str] = []
        reference = next(student.parameters(), torch.zeros(()))
        self._device = reference.device
        self._take()
        self._from = Normalisation(getattr(student, 'data_preprocessor', None)).to(reference.device)
        self._to = Normalisation(getattr(model, 'data_preprocessor', None)).to(reference.device)
        #: channels of the student's pictures and of the teacher's; None for a student without any layer
        self.channels = (input_channels(student) if next(student.parameters(), None) is not None else None,
                         input_channels(model))
        self.same_input = self._same_input()
        if input_key is None:
            self._say_channels()
        #: (H, W) to which the batch is resized first, for taps that an adapter compares; None leaves it as it is.
        self.size: Optional[Tuple[int, int]] = None
        #: at which size it sees the batch, and what its model needs; None for the student's.
        self.view: Optional[View] = None
        self.needs: Optional[View] = None
        #: which of its classes are which of the student's, see :func:`kd_mm.ops.classes.map_classes`; None for no map.
        self.class_map: Any = None
        #: field of the samples that it is shown instead of the student's pictures; None for none.
        self.input_key: Optional[str] = None
        self.calls: Dict[str, int] = {}
        self.runs = 0
        self.go(EXACT)

    def _take(self) -> None:
        """Freeze the model where the student is, in eval mode, and note of which modules it is made."""
        model = self.model
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.eval()
        model.to(self._device)
        self._modules = list(model.modules())
        self._known = {id(module) for module in self._modules}
        #: the children of each module, as they are and as they were
        self._children = [(module._modules, list(module._modules.values())) for module in self._modules]

    @property
    def fixed(self) -> bool:
        """Whether its weights stay as they are during the training."""
        return type(self).after_step is Teacher.after_step

    def go(self, speed: Any) -> None:
        """Run in this form from now on.

        Args:
            speed: see :func:`kd_mm.teachers.speed.speed_of`.

        Raises:
            ValueError: there is no such form, or this teacher has no other than its own.
        """
        device = next(self.model.parameters(), torch.zeros(())).device
        #: how it runs.
        self.fast = Fast(self.model, speed_of(f'teacher {self.name}', speed, device), self._forward,
                         f'teacher {self.name}', self.fixed)

    def look(self, view: Any, input_key: Optional[str] = None) -> None:
        """See the batch at another size, or another field of the samples, from now on.

        Args:
            view: see :func:`kd_mm.teachers.view.view_of`.
            input_key: name of the field in ``metainfo`` of the data samples; None for the student's own pictures.

        Raises:
            ValueError: a wrong value, or two sizes.
        """
        owner = f'teacher {self.name}'
        self.view = view_of(owner, view, self.needs)
        if self.view is not None and self.size is not None:
            raise ValueError(f'{owner}: preprocess size={self.size} and view={view!r} both resize its pictures; give '
                             'one')
        if input_key is not None and not (isinstance(input_key, str) and input_key):
            raise ValueError(f'{owner}: input_key={input_key!r} must be the name of a field of the samples')
        self.input_key = input_key

    def share_start(self, student: nn.Module) -> None:
        """Let the student have what the frozen modules that both have in common give, see
        :mod:`kd_mm.teachers.shared`."""
        if self.fixed and self.same_input and self.size is None and self.view is None and self.input_key is None:
            self.fast.shared = Shared(student, self.model)

    def _same_input(self) -> bool:
        own, wanted = self.channels
        return self._from == self._to and own in (None, wanted)

    def _say_channels(self) -> None:
        """Note a conversion between grey and colour.

        Raises:
            ValueError: there is no one right conversion.
        """
        if not bool(self._to.std.all()):
            raise ValueError(f'teacher {self.name}: std={self._to.std.flatten().tolist()} of its data_preprocessor has '
                             'a 0, by which its pictures would be divided')
        own, wanted = self.channels
        if own in (None, wanted):
            return
        if (own, wanted) == (1, 3):
            how = 'the grey channel is given to it three times'
        elif (own, wanted) == (3, 1):
            order = 'RGB' if self._from.swapped else 'BGR'
            how = f'the batch, taken as {order}, becomes grey: 0.299 R + 0.587 G + 0.114 B'
        else:
            raise ValueError(
                f'teacher {self.name} takes pictures of {wanted} channels and the student ({own} channels) is given '
                'others, which have no one right conversion. Give a teacher with the bands of the student (in_channels '
                f'of its backbone and the mean and std of its data_preprocessor: {own})')
        self.notes.append(f'teacher {self.name} takes pictures of {wanted} channels and the student {own}: {how}')

    def start(self, resumed: bool) -> None:
        """Training begins: the student has its first weights. A fixed teacher has nothing to do."""

    def after_step(self, step: int, max_steps: int) -> None:
        """The student's optimizer has made step ``step`` of ``max_steps`` (0: unknown)."""

    def state(self) -> Dict[str, Any]:
        """What a resume needs; nothing for a fixed teacher."""
        return {}

    def load(self, state: Dict[str, Any]) -> None:
        """Restore :meth:`state`."""

    @classmethod
    def build(cls, source: Any, student: nn.Module, checkpoint: Optional[str] = None, strict: bool = True,
              scope: Optional[str] = None, seed: int = 0, folder: Optional[str] = None) -> 'Teacher':
        """Build a teacher from a config.

        Args:
            source: see :func:`load_config`; or a ready ``nn.Module``, taken with the weights it has.
            student: the student.
            checkpoint: path or URL of the weights; ``'random'`` for none; None for the published weights of an
                installed config.
            strict: whether the weights must fit exactly.
            scope: registry scope where the config names none: the student's.
            seed: of the weights of a random teacher.
            folder: where a relative path is looked for after the current folder.

        Raises:
            FileNotFoundError, ValueError: nothing there, or it does not fit; the message names the mend.
        """
        return cls.from_spec(TeacherSpec(source, student, checkpoint, strict, scope, seed, folder=folder))

    @classmethod
    def from_spec(cls, spec: TeacherSpec) -> 'Teacher':
        """The same from a :class:`~kd_mm.teachers.spec.TeacherSpec`."""
        if isinstance(spec.source, nn.Module):
            return cls(spec.source, spec.student, type(spec.source).__name__, None, spec.input_key)
        cfg, name, path = load_config(spec.source, spec.folder)
        with spec.drawn():
            try:
                model = build_model(cfg, spec.scope)
            except FileNotFoundError as error:
                raise ValueError(
                    f'teacher {name} cannot be built: its own config names a file that is not there: {error} (a '
                    f'relative path is looked for in {os.getcwd()}). Give a config that inherits from it with the '
                    'whole path') from error
            wanted, given = task_of(spec.student), task_of(model)
            if wanted and given and wanted != given:
                raise ValueError(f'teacher {name} is a {given} model ({type(model).__name__}) and the student does '
                                 f'{wanted} ({type(spec.student).__name__})')
            if spec.checkpoint is None:
                spec = dataclasses.replace(spec, checkpoint=default_weights(path))
                if spec.checkpoint is None:
                    raise ValueError(f'no weights for teacher {name}: it is not in the model index of an installed '
                                     "host. Give teacher_ckpt='path or URL' (or teacher_ckpt='random' to test)")
            if not spec.wants_file and hasattr(model, 'init_weights'):
                model.init_weights()
            loaded = ckpt.load(spec.checkpoint) if spec.wants_file else None
            notes = spec.load(model, loaded=loaded)
        teacher = cls(model, spec.student, name, class_names(cfg, loaded), spec.input_key)
        teacher.notes += notes
        return teacher

    def renormalise(self, inputs: Tensor, batch: KDBatch) -> Tensor:
        """The student's batch as this teacher's own preprocessor would have made it.

        Raises:
            ValueError: the channels do not fit.
        """
        if self.same_input:
            return inputs
        channels = inputs.shape[1]
        wanted = self.channels[1] if self.channels[0] == channels else channels
        for side, norm, count in (('student', self._from, channels), ('teacher', self._to, wanted)):
            if norm.mean.numel() not in (1, count) or norm.std.numel() not in (1, count):
                raise ValueError(
                    f'teacher {self.name}: a batch of {channels} channels cannot be re-normalised: the {side} has '
                    f'{count} channels and its data preprocessor {norm.mean.numel()} means. Give both the same '
                    'data_preprocessor')
        source, target = self._from, self._to
        mean_from, std_from, mean_to, std_to = (
            part.to(inputs.dtype) for part in (source.mean, source.std, target.mean, target.std))
        image = inputs * std_from + mean_from
        if channels == 3 and wanted == 1:
            luma = inputs.new_tensor(_LUMA if source.swapped else _LUMA[::-1])
            image = (image * luma.view(3, 1, 1)).sum(1, keepdim=True)
        elif channels == 1 and wanted == 3:
            image = image.expand(-1, 3, -1, -1)
        elif channels == 3 and source.swapped != target.swapped:
            image = image.flip(1)  # bands of other numbers have no order of colours
        image = (image - mean_to) / std_to
        height, width = image.shape[-2:]
        for index, (h, w) in enumerate(targets.img_shapes(batch)):
            # Padding is written after normalisation, so it is no grey level that could be converted.
            if h < height:
                image[index, :, h:] = target.pad_value
            if w < width:
                image[index, :, :, w:] = target.pad_value
        return image

    def prepare(self, inputs: Tensor, data_samples: Any, batch: KDBatch) -> Tuple[Tensor, Any]:
        """What its model is given: pictures with its own normalisation, at its own size, and the samples that belong to
        them.

        Args:
            inputs: the student's normalised batch (N, C, Hin, Win).
            data_samples: of the host.
            batch: for the valid area of the images.

        Raises:
            ValueError: the channels do not fit, or the samples do not have the field that it is shown.
        """
        if self.input_key is None:
            images = self.renormalise(inputs, batch)
        else:
            images = pictures_beside(self, inputs, data_samples)
        if self.size is not None:
            images = resize(images, self.size)
        if self.view is None:
            return images, data_samples
        seen = self.view.of((inputs.shape[-2], inputs.shape[-1]))
        pad_value = self._from.pad_value if self.same_input and self.input_key is None else self._to.pad_value
        samples = data_samples if task_of(self.model) is None else samples_seen(data_samples, seen)
        return self.view.apply(images, pad_value), samples

    def records(self, taps: Sequence[Tap], inputs: Tensor) -> Dict[str, Recorded]:
        """What the taps that fired have recorded of a batch of the student, by path."""
        found = {tap.path: tap.read() for tap in taps}
        if self.view is not None:
            for record in found.values():
                record.seen = self.view.of((inputs.shape[-2], inputs.shape[-1]))
        return found

    def _judge_units(self, images: Tensor) -> None:
        """Note a mean and deviation that are meant for pictures of 0..1, with what the first input became by them."""
        mean, std = self._to.mean, self._to.std
        if self.same_input or not (0 < float(mean.abs().max()) <= 1 or float(std.max()) < 1):
            return
        values = images.float()
        numbers = [', '.join(f'{number:.4g}' for number in part.flatten().tolist()) for part in (mean, std)]
        scaled = [', '.join(f'{255 * number:.4g}' for number in part.flatten().tolist()) for part in (mean, std)]
        self.notes.append(
            f'teacher {self.name}: its first input has the mean {float(values.mean()):.4g} and the deviation '
            f'{float(values.std()):.4g} after its normalisation (mean={numbers[0]}; std={numbers[1]}), where numbers '
            'around 0 and 1 are usual: mean and std look as if pictures were 0..1, and they are 0..255. If so, write '
            f'mean=({scaled[0]}), std=({scaled[1]})')

    def check_eval(self) -> None:
        """Put back any module that something switched to training mode; take in modules that were put in since, of
        which the next pass finds anew in which form they may run."""
        if self.model is not self._modules[0] or any(
                list(children.values()) != known for children, known in self._children):
            self._take()
            self.calls.clear()
            self.fast = self.fast.anew(self.model)
            print_log(f'kd_mm: teacher {self.name}: modules of it were exchanged; they are frozen and in eval mode, '
                      'and its form is chosen anew', 'current', level=30)
        for module in self._modules:
            if module.training:
                self.model.eval()
                return

    @torch.no_grad()
    def run(self, inputs: Tensor, data_samples: Any, taps: Sequence[Tap], batch: KDBatch, full: bool = False) -> None:
        """One forward pass that fills ``taps`` and stops when each has as many records as in the first pass.

        Args:
            inputs: the student's normalised batch (N, 3, Hin, Win).
            data_samples: for hosts whose forward reads image sizes from them.
            taps: the teacher taps of this step.
            batch: for the valid area of the images.
            full: run to the end (the first pass, which counts the calls).
        """
        self.check_eval()
        for tap in taps:
            if isinstance(tap.owner, nn.Module) and id(tap.owner) not in self._known:
                tap.move(self.model)  # to the module that is there now
        self.runs += 1
        images, samples = self.prepare(inputs, data_samples, batch)
        if self.runs == 1:
            self._judge_units(images)
        if full or self.fast.unseen:
            self.fast.dry(images, samples, taps, partial(self._forward, full=True))
        else:
            self.fast.run(images, samples, taps)

    def _forward(self, images: Tensor, data_samples: Any, taps: Sequence[Tap], full: bool = False) -> None:
        """A pass of the model as the host runs it."""
        pending = {tap.path: self.calls.get(tap.path, 0) for tap in taps}
        counted = not full and all(pending.values())

        def keep(tap: Tap) -> None:
            pending[tap.path] -= 1
            if counted and not any(left > 0 for left in pending.values()):
                raise StopForward

        for tap in taps:
            tap.keep = keep
            tap.arm((images.shape[-2], images.shape[-1]))
        try:
            forward_tensor(self.model, images, data_samples, [tap.path for tap in taps])
        except StopForward:
            pass
        except Exception:
            # In the dry pass a model may fail after the last tap, where training will not run it at all.
            if not full or not all(tap.fired for tap in taps):
                raise
        finally:
            for tap in taps:
                tap.disarm()
                tap.keep = None
        if full:
            self.calls.update({tap.path: tap.calls for tap in taps})
