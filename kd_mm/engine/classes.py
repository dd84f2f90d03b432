"""What a term asks of the classes of both models, as sentences for the user."""

from typing import Any, List, Optional, Sequence

from kd_mm.ops.classes import is_background


def class_problems(term: Any, ours: Optional[Sequence[str]], theirs: Optional[Sequence[str]]) -> List[str]:
    """What is wrong with the classes that a term compares as they are; nothing where a side's names are not known.

    Args:
        term: a :class:`kd_mm.engine.term.Term`.
        ours, theirs: class names of the side that learns and of the other.
    """
    kind, found = type(term.loss).__name__, []
    if term.loss.needs_background and ours and not is_background(ours[0]):
        found.append(f'{term.title}: {kind} needs the background as first class, which holds what a model does not '
                     f"know; the first of {names(ours)} is none (it is called 'background' or the like). For data "
                     'without one use a feature loss, such as LocalPODLoss')
    if not term.of_classes or not ours or not theirs:
        return found
    if term.loss.grows:
        if list(ours)[:len(theirs)] != list(theirs):
            found.append(f"{term.title}: {kind} needs a student whose classes begin with the teacher's, in the same "
                         f'order. Student ({len(ours)}): {names(ours)}. Teacher ({len(theirs)}): {names(theirs)}')
    elif list(ours) != list(theirs):
        found.append(f'{term.title}: a logit loss needs the same classes in the same order. '
                     f'Student ({len(ours)}): {names(ours)}. '
                     f'Teacher ({len(theirs)}): {names(theirs)}. Give classes=\'common\' (or the '
                     'names to compare), use a feature loss, or a teacher trained on these classes')
    return found


def names(classes: Optional[Sequence[str]]) -> str:
    """The first class names of a model.

    Example:
        >>> names(['car', 'person']), names(None)
        ('car, person', 'classes unknown')
    """
    if not classes:
        return 'classes unknown'
    return ', '.join(map(str, classes[:20])) + (', ...' if len(classes) > 20 else '')
