"""The reader of masks that one-stage heads make from kernels: both models at the same priors."""

from typing import Any, Dict, List, Mapping, Optional, Sequence

from torch import nn

from kd_mm.engine.readers.base import ClassPair, Comparison, Reader, Records
from kd_mm.hosts.heads.instance_masks import instance_mask_taps, instance_masks, kind_of
from kd_mm.hosts.places import INSTANCE_MASKS
from kd_mm.types.batch import Given, KDBatch, Targets


class InstanceMaskReader(Reader):
    """Rows (M, 1, h, w): the mask of each positive prior of the student.

    Args:
        title, at, levels: see :class:`Reader`; there is one list of rows, so ``levels`` must be None.
    """

    place = INSTANCE_MASKS

    def __init__(self, title: str, at: Dict[str, Any], levels: Mapping[str, Optional[Sequence[int]]]):
        super().__init__(title, at, levels)
        if any(found is not None for found in levels.values()):
            raise ValueError(f'{title}: {self.place!r} is one list of rows; remove levels')
        self.kinds: Dict[str, str] = {}

    def locate(self, side: str, model: nn.Module) -> List[str]:
        self.kinds[side] = kind_of(model, side)
        self.paths[side] = instance_mask_taps(side, model)
        return self.paths[side]

    def settle(self, student: nn.Module, teacher: nn.Module) -> None:
        if len(set(self.kinds.values())) > 1:
            raise ValueError(f'{self.place!r}: the student has a {self.kinds["student"]} and the teacher a '
                             f'{self.kinds["teacher"]}, whose priors are others; the same kind of head is needed')

    def read(self, student: Records, teacher: Records, batch: KDBatch,
             classes: Optional[ClassPair] = None) -> Comparison:
        ours, theirs = instance_masks(self.kinds['student'], student, teacher)
        # A batch that knows nothing of the images: these rows are not they.
        own_batch = KDBatch(Targets(input_shape=batch.targets.input_shape), batch.info, Given(row_totals=[len(ours)]))
        return Comparison((ours, ), (theirs, ), own_batch)

    def describe(self) -> str:
        return 'masks at the positive priors of the student'
