"""What a source of teachers is given."""

from dataclasses import dataclass
from typing import Any, List, Optional, Sequence

from torch import nn

from kd_mm.hosts import checkpoint as ckpt
from kd_mm.hosts.weights import load_weights
from kd_mm.ops.modes import preserved_random_state
from kd_mm.teachers.speed import AUTO

#: ``teacher_ckpt`` for untrained weights.
RANDOM = 'random'
#: ``teacher_ckpt`` of a source that loads its weights itself.
OWN = 'own'


@dataclass(frozen=True)
class TeacherSpec:
    """One teacher as the config asks for it.

    Attributes:
        source: what ``teacher=`` says.
        student: the model in training.
        checkpoint: what ``teacher_ckpt=`` says: a path or URL, ``'random'``, ``'own'``, or None.
        strict: whether the weights must fit exactly. Default True.
        scope: registry scope where a config names none: the student's.
        seed: of weights that are drawn. Default 0.
        classes: class names of the student, if known.
        speed: in which form it runs, see :mod:`kd_mm.teachers.speed`. Default ``'auto'``.
        view: at which size it sees the batch, see :mod:`kd_mm.teachers.view`; None for the student's.
        input_key: name of the field of a sample that it is shown instead of the student's picture; None for none.
        folder: of the config, where relative paths are looked for after the current folder; None if unknown.
    """

    source: Any
    student: nn.Module
    checkpoint: Any = None
    strict: bool = True
    scope: Optional[str] = None
    seed: int = 0
    classes: Optional[Sequence[str]] = None
    speed: Any = AUTO
    folder: Optional[str] = None
    view: Any = None
    input_key: Optional[str] = None

    @property
    def class_names(self) -> Optional[List[str]]:
        """The student's class names as a list; None if they are not known."""
        return list(self.classes) if self.classes else None

    @property
    def wants_file(self) -> bool:
        """Whether weights are to be read from a file."""
        return self.checkpoint is not None and not (
            isinstance(self.checkpoint, str) and self.checkpoint in (RANDOM, OWN))

    def drawn(self) -> Any:
        """A context in which weights are drawn from :attr:`seed`, and the run's own random numbers stay as they are.

        Not from the seed itself: the Runner may have drawn the student from the same one, and of two equal networks
        neither learns.
        """
        return preserved_random_state((self.seed * 1_000_003 + 7_919) % (2**63 - 25))

    def load(self, model: nn.Module, what: str = 'teacher', loaded: Any = None) -> List[str]:
        """Load the file of :attr:`checkpoint` into a model; nothing to do where there is none.

        Args:
            model: the network.
            what: word for the notes.
            loaded: content of the file, if it was read already.

        Returns:
            What was mapped or tolerated, as sentences for the log.

        Raises:
            ValueError, FileNotFoundError: no such file, or it does not fit.
        """
        if not self.wants_file:
            return []
        content = ckpt.load(self.checkpoint) if loaded is None else loaded
        return [f'{what} checkpoint {self.checkpoint} {note}'
                for note in load_weights(model, content, self.checkpoint, self.strict)]
