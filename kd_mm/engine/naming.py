"""What the classes of the models of a distillation are called, and how many there are."""

from typing import Any, Dict, List, Optional, Sequence

from torch import nn

from kd_mm.engine.term import STUDENT
from kd_mm.hosts.synthetic import find_num_classes
from kd_mm.teachers.base import Teacher


class Names:
    """The classes of a student and of its teachers.

    Args:
        student: the model.
        classes: its class names, if known.
        teachers: by name.
    """

    def __init__(self, student: nn.Module, classes: Optional[Sequence[str]], teachers: Dict[str, Teacher]):
        self.student, self.teachers = student, teachers
        self.classes = list(classes) if classes else None

    def classes_of(self, name: str) -> Optional[List[str]]:
        """Class names of a model, if known; those of the student for a name that no teacher has."""
        return self.teachers[name].classes if name in self.teachers else self.classes

    def count_of(self, name: str) -> Optional[int]:
        """Number of classes of a model: by its names, else by its heads; None where neither tells."""
        names = self.classes_of(name)
        return len(names) if names else self.heads_of(name)

    def heads_of(self, name: str) -> Optional[int]:
        """Number of classes by the heads of a model; None where they do not tell."""
        try:
            return find_num_classes(self.teachers[name].model if name in self.teachers else self.student)
        except ValueError:
            return None

    def map_of(self, name: str, learner: str = STUDENT) -> Any:
        """``classes=`` of a teacher, see :func:`kd_mm.ops.classes.map_classes`; None where it has none."""
        return self.teachers[name].class_map if name in self.teachers and learner == STUDENT else None


def names_text(classes: Optional[Sequence[str]]) -> str:
    """Names of classes for messages, the first 20 of them."""
    if not classes:
        return 'classes unknown'
    return ', '.join(map(str, classes[:20])) + (', ...' if len(classes) > 20 else '')
