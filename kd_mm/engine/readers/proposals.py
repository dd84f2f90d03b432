"""The reader of rows: what both models say about the same proposals."""

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from torch import nn

from kd_mm.engine.readers.base import Comparison, Reader, Records
from kd_mm.hosts.heads import proposals as roi_head
from kd_mm.ops.classes import ClassPair
from kd_mm.types.batch import Given, KDBatch, Targets
from kd_mm.types.proposals import PROPOSALS, compared
from kd_mm.types.records import Recorded


class ProposalReader(Reader):
    """Rows of a place of :data:`kd_mm.hosts.places.SHARED`, one level a stage of a cascade.

    Args:
        title, at, levels: see :class:`Reader`; ``levels`` are stages.
        proposals: whose they are, see :data:`kd_mm.types.proposals.PROPOSALS`.
    """

    def __init__(self, title: str, at: Dict[str, Any], levels: Mapping[str, Optional[Sequence[int]]], proposals: str):
        super().__init__(title, at, levels)
        self.place: str = at['student']
        self.proposals = proposals
        self.stages: List[Tuple[int, int]] = []

    @property
    def first_stage(self) -> bool:
        """Whether the rows are sampled anchors."""
        return self.place.startswith('@rpn')

    def locate(self, side: str, model: nn.Module) -> List[str]:
        self.paths[side] = roi_head.proposal_taps(self.place, side, model, self.proposals)
        return self.paths[side]

    def settle(self, student: nn.Module, teacher: nn.Module) -> None:
        if not self.paths['student'] or not self.paths['teacher']:
            return
        stages = roi_head.stage_pairs(self.place, student, teacher, self.levels['student'], self.levels['teacher'],
                                      self.proposals)
        if self.stages and self.stages != stages:
            raise ValueError('the RoI heads of its teachers have different numbers of stages; give each a loss of its '
                             'own')
        self.stages = stages
        heads: Any = student, teacher
        if self.first_stage and not roi_head.same_anchors(*(model.rpn_head for model in heads)):
            raise ValueError(f'{self.place!r}: the proposal heads of student and teacher have different anchors')

    def read(self, student: Records, teacher: Records, batch: KDBatch,
             classes: Optional[ClassPair] = None) -> Comparison:
        if self.first_stage:
            views = [roi_head.rpn_views(student, teacher)]
        else:
            views = roi_head.roi_views(self.place, student, teacher, self.stages, self.proposals)
        chosen, count = None, 0
        if classes is not None:
            (own_count, own), (count, theirs) = classes
            chosen = own_count, (own, theirs)
        rows = [compared(self.place, *pair, chosen, count) for pair in views]
        targets = [part.targets for part in rows if part.targets is not None]
        # A batch that knows the rows, and nothing of the images that they are not.
        own_batch = KDBatch(Targets(input_shape=batch.targets.input_shape), batch.info, Given(
            row_labels=[part.labels for part in rows], row_targets=targets or None,
            row_totals=[part.total for part in rows]))
        return Comparison(tuple(part.student for part in rows), tuple(part.teacher for part in rows), own_batch)

    def edges(self, record: Recorded) -> Tuple[Any, ...]:
        # On the teacher's proposals the student's head runs once more, on the features that its own call was given.
        return record.edges if self.first_stage or self.proposals == PROPOSALS[0] else record.given

    def describe(self) -> str:
        if self.first_stage:
            return 'sampled anchors'
        return 'stages: ' + ', '.join(f'student {s} with teacher {t}' for s, t in self.stages)
