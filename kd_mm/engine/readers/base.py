"""What a reader is: it finds what a term compares in two models, and reads it from what their taps recorded."""

from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from torch import Tensor, nn

from kd_mm.hosts.meaning import CLASSES, Meaning
from kd_mm.ops.classes import ClassPair
from kd_mm.types.batch import KDBatch
from kd_mm.types.records import Recorded

#: What one model's taps recorded in a step, by path.
Records = Mapping[str, Recorded]


@dataclass
class Comparison:
    """What one term compares in one step.

    Attributes:
        student: levels (N, C, H, W) of the side that learns, rows (M, ...), or the view of a head.
        teacher: the same of the side that is learned from; of several teachers their mean.
        batch: what the loss and its region may know of the images, and what belongs to this term alone: logits of a
            region, chosen instances, labels of rows.
        term: whose it is.
    """

    student: Any
    teacher: Any
    batch: KDBatch
    term: Any = None


class Reader:
    """Finds what a term compares, and reads it.

    It knows two sides, ``'student'`` for the model that learns and ``'teacher'`` for the one it learns from; which
    models these are is not its business, so that a peer and the student exchange the roles.

    Args:
        title: name of the term for messages.
        at: where to look, by side.
        levels: which levels are kept, by side; None for all.

    Attributes:
        paths: tap paths by side, see :meth:`locate`.
        optional: student paths of which not every one fires in every step.
        meanings: by side: path -> what the channels there mean, for all paths of levels; None where it is not known.
    """

    def __init__(self, title: str, at: Dict[str, Any], levels: Mapping[str, Optional[Sequence[int]]]):
        self.title, self.at, self.levels = title, at, levels
        self.paths: Dict[str, List[str]] = {'student': [], 'teacher': []}
        self.optional: List[str] = []
        self.meanings: Dict[str, Dict[str, Optional[Meaning]]] = {'student': {}, 'teacher': {}}

    def locate(self, side: str, model: nn.Module) -> List[str]:
        """The paths to tap in the model of one side; they are kept in :attr:`paths`.

        Raises:
            KeyError: a place that the model does not have.
            ValueError: the loss cannot use what is there.
        """
        raise NotImplementedError

    def settle(self, student: nn.Module, teacher: nn.Module) -> None:
        """Decide what depends on both models: called once after :meth:`locate` for each teacher.

        Raises:
            ValueError: they do not fit.
        """

    def keeps_calls(self, path: str) -> bool:
        """Whether the tap at ``path`` must keep whole calls and not only their tensors."""
        return True

    def read(self, student: Records, teacher: Records, batch: KDBatch,
             classes: Optional[ClassPair] = None) -> Comparison:
        """What is to be compared in this step.

        What needs both sides (one model's head on the other's proposals or features) is asked here, on features that
        the taps have kept; the records remember the answers, so that several terms ask once.

        Args:
            student, teacher: what the taps of both sides recorded.
            batch: the images and targets of the step.
            classes: which classes to compare, for logits of models with different ones.

        Raises:
            ValueError: the two sides do not fit.
        """
        raise NotImplementedError

    def edges(self, record: Recorded) -> Tuple[Any, ...]:
        """Where in the graph a record of the side that learns is what the term depends on."""
        return record.edges

    def modules(self, side: str, model: nn.Module, records: Records) -> List[Any]:
        """The module behind each level of one side, for losses that look at them; empty where there are none."""
        return []

    def meanings_of(self, side: str, records: Records) -> List[Optional[Meaning]]:
        """What the channels of each level of one side mean; empty where there are no levels of maps."""
        return []

    def has_classes(self) -> bool:
        """Whether names of classes say anything about what is compared: not for objectness or boxes."""
        return all(any(meaning is None or meaning.kind == CLASSES for meaning in found.values()) or not found
                   for found in self.meanings.values())

    def where(self, side: str) -> str:
        """The tap of one side for messages: as it was written, and what it stands for."""
        at, paths = self.at[side], ', '.join(self.paths[side])
        return repr(at) if at == paths or not paths or not isinstance(at, str) else f'{at!r} ({paths})'

    def describe(self) -> str:
        """Which level meets which, in words."""
        return 'levels by index'


def shapes_text(features: Sequence[Tensor]) -> str:
    """``[2x16x8x8, 2x16x4x4]``."""
    return '[' + ', '.join('x'.join(map(str, tensor.shape)) for tensor in features) + ']'
