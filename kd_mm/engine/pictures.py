"""What there is to see at one image: features, regions and pulls of each term, as maps.

It takes passes of its own, in eval mode and on taps of its own, and copies of what computes a term, so that a training
in whose middle it happens goes on as if nothing had been looked at.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from kd_mm.engine.likeness import are_classes, independent
from kd_mm.engine.readers.base import Comparison
from kd_mm.engine.readers.heads import HeadReader
from kd_mm.engine.readers.maps import MapReader
from kd_mm.engine.step import Step
from kd_mm.engine.term import STUDENT, Term
from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.taps import Tap, image_size
from kd_mm.losses.base.loss import total
from kd_mm.ops.modes import eval_mode
from kd_mm.types.batch import KDBatch
from kd_mm.types.records import Recorded
from kd_mm.types.targets import img_shapes

#: What is drawn of class logits.
BEST = 'score of the best class'


@dataclass
class Level:
    """One level of a term.

    Attributes:
        title: which term, loss and level.
        what: what the numbers of ``maps`` are.
        maps: caption -> (h, w), those that share a scale: of the teacher, of the student and of the adapted student.
        others: caption -> (h, w), each of a scale of its own.
    """

    title: str
    what: str = 'root mean square over the channels'
    maps: Dict[str, np.ndarray] = field(default_factory=dict)
    others: Dict[str, np.ndarray] = field(default_factory=dict)


class Lookout:
    """Looks at the terms of a distiller's student.

    Args:
        current: the step of the distiller; nothing of it is changed.
    """

    def __init__(self, current: Step):
        self.current = current
        self.terms: List[Term] = [term for term in current.terms if term.learner == STUDENT]
        self.step = Step(current.student, current.teachers, self.terms, current.seed, current.max_steps)
        for name, path in current.keys(self.terms):
            tap = current.taps[name, path]
            self.step.taps[name, path] = Tap(current.model(name), path, current.word(name), structured=tap.structured,
                                             tokens=tap.tokens)

    def look(self, inputs: Tensor, samples: Any) -> Tuple[List[Level], Dict[str, str]]:
        """What the terms see in one image, and which of them have no maps: name -> why.

        Args:
            inputs: (1, C, Hin, Win), as the student's data preprocessor gives it.
            samples: of the host, with their targets.
        """
        self.step.number = self.current.number
        batch = self.step.batch_of(inputs, samples)
        records = {name: self._pass(name, inputs, samples, batch)
                   for name in dict.fromkeys(name for name, _ in self.step.taps)}
        levels: List[Level] = []
        missing: Dict[str, str] = {}
        for term in self.terms:
            try:
                levels += self._of_heads(term, records) if isinstance(term.reader, HeadReader) else self._of_maps(
                    term, records, batch)
            except KeyError as error:
                missing[term.name] = f'{error.args[0]} gives nothing outside of a pass with losses'
            except Exception as error:  # a loss or a region may want what one picture does not have
                missing[term.name] = f'{type(error).__name__}: {error}'
        for level in levels:
            for found in (level.maps, level.others):
                found.update({caption: _unpadded(values, batch) for caption, values in found.items()})
        return levels, missing

    @torch.no_grad()
    def _pass(self, name: str, inputs: Tensor, samples: Any, batch: KDBatch) -> Dict[str, Recorded]:
        """One forward pass of a model, as the host runs it."""
        model = self.step.model(name)
        taps = [tap for (owner, _), tap in self.step.taps.items() if owner == name]
        teacher = self.step.teachers.get(name)
        images = inputs
        if teacher is not None:
            images, samples = teacher.prepare(inputs, samples, batch)
        for tap in taps:
            tap.arm(image_size(images))
        try:
            with eval_mode(model):
                forward_tensor(model, images, copy.deepcopy(samples), [tap.path for tap in taps])
        except Exception:
            if not any(tap.fired for tap in taps):  # what lies after the last tap is nobody's business here
                raise
        finally:
            for tap in taps:
                tap.disarm()
        fired = [tap for tap in taps if tap.fired]
        found = {tap.path: tap.read() for tap in fired} if teacher is None else teacher.records(fired, inputs)
        for tap in taps:
            tap.clear()
        return found

    def _of_maps(self, term: Term, records: Dict[str, Dict[str, Recorded]], batch: KDBatch) -> List[Level]:
        if not isinstance(term.reader, MapReader):
            raise ValueError('it compares rows of proposals, which are no maps')
        comparison, = self.step.read([term], records, batch)
        student, teacher = comparison.student, comparison.teacher
        if any(tensor.dim() != 4 for tensor in (*student, *teacher)):
            raise ValueError('its taps give no maps (N, C, H, W)')
        scores = are_classes(term, list(zip(student, teacher)))
        adapted, regions, pulls = self._evaluated(comparison)
        found = []
        for index in range(len(student)):
            level = Level(_title(term, index, len(student)))
            level.what = BEST if scores else level.what
            sides = [('teacher', teacher[index]), ('student', student[index])]
            if adapted is not None:
                sides.append(('adapted', adapted[index]))
            for caption, tensor in sides:
                level.maps[f'{caption} {_size(tensor)}'] = _seen(term, tensor, scores)
            if regions is not None:
                level.others['region'] = _array(regions[index][0, 0])
            if pulls[index] is not None:
                level.others['pull'] = _array(pulls[index])
            found.append(level)
        return found

    def _evaluated(self, comparison: Comparison) -> Tuple[
            Optional[Sequence[Tensor]], Optional[Sequence[Tensor]], List[Any]]:
        """The adapted student, the region, and how hard the loss pulls at each cell of the student.

        The pull is the norm of the loss's gradient over the channels of a cell: what the loss of a cell would be for
        losses that have one, and the same for those that have not (relations between cells, a softmax over them).
        """
        term: Term = comparison.term
        # Copies: a memory bank, a running mean or an opponent of the training must not see this image.
        loss, adapter, region = copy.deepcopy((term.loss, term.adapter, term.region))
        for module in (loss, adapter, region):
            if module is not None:
                module.eval()
        leaves = tuple(level.detach().requires_grad_() for level in comparison.student)
        student, teacher = leaves, comparison.teacher
        with torch.enable_grad(), torch.autocast(leaves[0].device.type, enabled=False):
            if adapter is not None:
                student, teacher = adapter(student, teacher)
            parts = [total(part) for part in loss.parts(student, teacher, comparison.batch, region)]
            weights = loss.weight.at(self.step.number, self.step.max_steps, len(parts))
            if not any(weights):
                weights = [1.0] * len(parts)
            value: Any = sum(part * weight for part, weight in zip(parts, weights))
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        with torch.no_grad():
            masks = None if region is None else region(tuple(level.float() for level in teacher), comparison.batch)
        changed = adapter is not None and any(
            new.shape != old.shape or not torch.equal(new, old) for new, old in zip(student, leaves))
        return ([level.detach() for level in student] if changed else None, masks,
                [None if gradient is None else gradient[0].float().norm(dim=0) for gradient in gradients])

    def _of_heads(self, term: Term, records: Dict[str, Dict[str, Recorded]]) -> List[Level]:
        """The class scores of two dense heads."""
        sides = []
        for side, name in (('teacher', self.step.source_of(term, term.sources[0])), ('student', term.learner)):
            record = records[name][term.reader.paths[side][0]]
            output = record.calls[-1].output
            maps = output[0] if isinstance(output, (tuple, list)) and output else ()
            if not isinstance(maps, (tuple, list)) or any(getattr(item, 'ndim', 0) != 4 for item in maps) or not maps:
                raise ValueError('its heads predict for queries, not for cells')
            sides.append((side, maps))
        found = []
        for index, (theirs, own) in enumerate(zip(sides[0][1], sides[1][1])):
            level = Level(_title(term, index, len(sides[0][1])), BEST)
            best = [_array(tensor[0].float().sigmoid().amax(dim=0)) for tensor in (theirs, own)]
            level.maps = {f'{side} {_size(tensor)}': picture for side, tensor, picture in zip(
                ('teacher', 'student'), (theirs, own), best)}
            if best[0].shape == best[1].shape:
                level.others['difference'] = np.abs(best[0] - best[1])
            found.append(level)
        return found


def _title(term: Term, index: int, count: int) -> str:
    level = f', level {index}' if count > 1 else ''
    return f'{term.name} ({type(term.loss).__name__}){level}'


def _unpadded(values: np.ndarray, batch: KDBatch) -> np.ndarray:
    """The cells of a map that the image covers."""
    (height, width), = img_shapes(batch)
    full = batch.targets.input_shape or (height, width)
    rows, columns = (-(-count * part // whole) for count, part, whole in zip(values.shape, (height, width), full))
    return values[:max(rows, 1), :max(columns, 1)]


def _size(tensor: Tensor) -> str:
    return 'x'.join(map(str, tensor.shape[1:]))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _seen(term: Term, tensor: Tensor, scores: bool) -> np.ndarray:
    """(h, w) of a map (1, C, h, w): the best class score, or the root mean square over the channels."""
    values = tensor[0].detach().float()
    if not scores:
        return _array(values.square().mean(dim=0).sqrt())
    alone = independent(term) or values.shape[0] == 1
    return _array((values.sigmoid() if alone else values.softmax(dim=0)).amax(dim=0))
