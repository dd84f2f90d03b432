"""What a first pass shows of the taps themselves: rows of own proposals, outputs of training alone, silent taps.

Each method gives a sentence that says side, path, shapes and what to do instead, or None where all is well.
"""

import difflib
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.engine.readers.base import shapes_text
from kd_mm.engine.readers.maps import MapReader
from kd_mm.engine.step import Step
from kd_mm.engine.term import Term
from kd_mm.hosts.models import task_of
from kd_mm.hosts.paths import module_at
from kd_mm.hosts.places import TRIDENT
from kd_mm.hosts.rows import DIMENSIONS, in_trunk, shared_places
from kd_mm.hosts.table import line
from kd_mm.hosts.taps import Tap
from kd_mm.losses.base.loss import KINDS, PicksInstances
from kd_mm.types.records import Recorded

#: What the taps of all models recorded: name of the model -> path -> record.
Records = Mapping[str, Mapping[str, Recorded]]
#: Runs one model with armed taps: (name of the model, taps, whether with its losses).
Run = Callable[[str, Sequence[Tap], bool], None]


def _said(record: Optional[Recorded]) -> bool:
    """Whether a tap has recorded a tensor or, with structure, a call."""
    return record is not None and bool(record or record.calls)


class Outputs:
    """Looks at what the taps of a first pass gave.

    Args:
        step: knows the models and their names.
        images: of the pass.
        records: of the pass.
        run: runs one model once more, for a message.
    """

    def __init__(self, step: Step, images: int, records: Records, run: Run):
        self.step, self.images, self.records, self.run = step, images, records, run

    def _sides(self, term: Term) -> List[Tuple[str, str, str]]:
        """(side, name of the model, path) of every tap of a term."""
        return [(side, name, path) for side, names in (
            ('student', [term.learner]), ('teacher', [self.step.source_of(term, source) for source in term.sources]))
            for name in names for path in term.reader.paths[side]]

    def _alone(self, term: Term) -> bool:
        """Whether both sides are one model in one pass, whose rows belong together."""
        return all(self.step.source_of(term, source) == term.learner for source in term.sources)

    # ------------------------------------------------------------------ rows

    def own_rows(self, term: Term) -> Optional[str]:
        """A tap below the second stage of a detector: each model has its own proposals there."""
        if term.shared or self._alone(term):
            return None
        for side, name, path in self._sides(term):
            places = shared_places(self.step.model(name), path)
            if places is None:
                continue
            record = self.records[name].get(path)
            gives = f'{shapes_text(record)} for {self.images} images' if record else 'nothing in a first pass'
            return (f'{term.title}: {side} {path!r} gives {gives}: rows of the proposals that this model alone has '
                    f'made, and row 7 is another box in the other model. {self._instead(term, places)}')
        return None

    def _instead(self, term: Term, places: Sequence[str]) -> str:
        kind, loss = type(term.loss).__name__, term.loss
        if not places:
            return f"This second stage cannot be asked about given proposals: use {kind} at maps, such as '@neck'"
        named = ' or '.join(repr(place) for place in places)
        text = f'At {named} both models are asked about the same proposals'
        takes = (2, ) if loss.rows_only else loss.takes
        images = (term.region is not None or loss.needs_boxes or loss.needs_seg_map or term.of_heads
                  or (isinstance(loss, PicksInstances) and loss.heads_at is not None))
        fit = [place for place in places if not images and (takes is None or DIMENSIONS[place] in takes)]
        if fit:
            return f'{text}: write at={fit[0]!r}'
        if takes is not None and not images:
            others = [place for place, count in DIMENSIONS.items() if count in takes and place != '@roi_masks']
            if others:
                needs = ' or '.join(KINDS[count] for count in sorted(takes))
                return f'{text}; {kind} needs {needs}: write at={others[0]!r}' + (
                    '' if 2 in takes else ", or tap maps, such as '@neck'")
        what = 'compares dense heads' if term.of_heads else 'looks at images'
        return f"{text}; {kind} {what}: tap " + ('one' if term.of_heads else "maps, such as '@neck'")

    def leading(self, term: Term) -> Optional[str]:
        """Rows or stacked layers at another head: the first dimension is not the images."""
        if not isinstance(term.reader, MapReader) or self._alone(term):
            return None
        takes = term.loss.takes
        for side, names in (('student', [term.learner]),
                            ('teacher', [self.step.source_of(term, source) for source in term.sources])):
            for name in names:
                if task_of(self.step.model(name)) is None:
                    continue
                for path, tensor in term.reader.levels_of(side, self.records[name]):
                    first = tensor.shape[0] if tensor.dim() else None
                    if in_trunk(path) or first == self.images:
                        continue
                    second = tensor.dim() > 1 and tensor.shape[1] == self.images
                    if second and (tensor.dim() == 3 or takes is None or 3 in takes):
                        continue  # tokens of all images, one after the other; the layers of a decoder
                    why = ('layers in one tensor: tap one of them' if second and tensor.dim() == 4 else
                           "rows of what this model alone has found. Tap maps, such as '@neck', or for the second "
                           "stage of a detector a shared place ('@roi_logits', '@roi_masks')")
                    return (f'{term.title}: {side} {path!r} gives {shapes_text([tensor])}: its first dimension is not '
                            f'that of the {self.images} images, these are {why}')
        return None

    # ------------------------------------------------------------------ training

    def unsettled(self, terms: Sequence[Term], learner: str) -> List[str]:
        """Paths of a model that trains whose outputs may be others in training than in the forward pass alone."""
        found: Dict[str, None] = {}
        for term in terms:
            if term.learner != learner or not isinstance(term.reader, MapReader):
                continue
            for path in term.reader.unpicked('student'):
                record = self.records[learner].get(path)
                if record and shared_places(self.step.model(learner), path) is None and self._may_change(
                        module_at(self.step.model(learner), path), path, record):
                    found[path] = None
        return list(found)

    @staticmethod
    def _may_change(module: Any, path: str, record: Recorded) -> bool:
        if in_trunk(path):
            return any(cls.__name__ == TRIDENT or line(cls, 'backbones') for cls in type(module).__mro__)
        return any(tensor.dim() != 4 for tensor in record) or (
            isinstance(module, nn.Module) and next(module.children(), None) is not None)

    def training(self, term: Term, late: Mapping[str, Recorded]) -> Optional[str]:
        """Outputs that are others in training: denoising queries, auxiliary branches.

        Args:
            late: what the paths of :meth:`unsettled` gave in a pass with losses.
        """
        for path in term.student_paths:
            before, after = self.records[term.learner].get(path), late.get(path)
            if not before or not after or _agree(before, after):
                continue
            model = self.step.model(term.learner)
            if hasattr(model, 'forward_decoder'):
                mend = "Queries are compared by losses such as DETRDistillLogitsLoss at='bbox_head'; maps by '@memory'"
            elif path == 'backbone':
                mend = "Write at='@backbone'"
            else:
                mend = "Tap what both give, such as '@logits', or a module inside of it"
            return (f'{term.title}: student {path!r} ({type(module_at(model, path)).__name__}) gives '
                    f'{shapes_text(after)} in training and {shapes_text(before)} in the forward pass alone, which is '
                    f'what a teacher runs: they do not belong together one by one. {mend}')
        return None

    # ------------------------------------------------------------------ silence

    def silent(self, term: Term) -> Optional[str]:
        """Taps that gave nothing, why, and what gives something beside them."""
        found = [(name, path) for name, path in self.step.keys([term])
                 if not _said(self.records[name].get(path)) and path not in term.reader.optional]
        if not found:
            return None
        name, path = found[0]
        where = ', '.join(f'{self.step.word(name)} {path!r}' for name, path in found)
        if isinstance(module_at(self.step.model(name), path), (nn.ModuleList, nn.ModuleDict)):
            return (f'{term.title}: the tap at {where} never fires: it is a list of modules, which is not called '
                    f"itself. Tap one of them, or all of them: at='{path}.*'")
        if self._trains(name, path):
            why = ('the module is used in training only (an auxiliary output, sampled points, label assignment), and a '
                   'teacher runs its forward pass alone')
        else:
            why = 'the module is not used by the forward pass, or returns no floating-point tensor'
        near = self._near(name, path)
        beside = f' Beside it {"fires" if len(near) == 1 else "fire"} {", ".join(near)}.' if near else ''
        return (f'{term.title}: the tap at {where} never fires: {why}.{beside} List all that do: '
                'kd-mm taps CONFIG')

    def _trains(self, name: str, path: str) -> bool:
        """Whether a module runs in a pass with losses."""
        return path in self._fired(name, [path], True)

    def _near(self, name: str, path: str, most: int = 4) -> List[str]:
        """The closest paths that fire, with shapes."""
        model, parent = self.step.model(name), path
        while '.' in parent:
            parent = parent.rpartition('.')[0]
            names = [other for other, _ in model.named_modules()
                     if other.startswith(f'{parent}.') and other.count('.') <= path.count('.')]
            fired = self._fired(name, [other for other in names if other != path], False)
            close = difflib.get_close_matches(path, list(fired), n=most, cutoff=0.0)
            if close:
                return [f'{other!r} {shapes_text(fired[other])}' for other in close]
        return []

    def _fired(self, name: str, paths: Sequence[str], losses: bool) -> Dict[str, List[Tensor]]:
        """What some paths of a model give in one more pass."""
        model = self.step.model(name)
        if task_of(model) is None:
            return {}
        taps = [Tap(model, path, self.step.word(name)) for path in paths]
        try:
            with torch.no_grad():
                self.run(name, taps, losses)
        except Exception:  # the pass is for a message: whatever fired before is enough
            pass
        finally:
            found = {tap.path: tap.peek() for tap in taps if tap.fired}
            for tap in taps:
                tap.clear()
        return found


def _agree(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether a tap gives in training what it gives otherwise, or that first and more after it."""
    shapes = [[tensor.shape for tensor in side] for side in (before, after)]
    if shapes[0] != shapes[1][:len(before)]:
        return False
    return len(before) == len(after) or all(
        torch.allclose(first.float(), second.float(), rtol=1e-2, atol=1e-4) for first, second in zip(before, after))
