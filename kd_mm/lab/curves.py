"""The weights of a distillation over its training, before it: as numbers and as a picture."""

import os
from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Tuple

from kd_mm.engine.term import Term
from kd_mm.ops.modulation import GradientShareSchedule
from kd_mm.ops.schedules import Weight

#: Points of a curve, before those at its jumps are added.
POINTS = 1000


@dataclass
class Curve:
    """One line.

    Attributes:
        label: which term and levels, and what is measured instead of given.
        steps: iterations, from 0.
        values: the weight at each; of a measured weight the share of the task's pull that it is held at.
        measured: whether it is a share.
    """

    label: str
    steps: List[int]
    values: List[float]
    measured: bool = False


def curves_of(terms: Sequence[Term], length: int) -> List[Curve]:
    """The curves of all terms, one for each weight that levels have in a term.

    Args:
        terms: of the student.
        length: iterations of the training, from 1.
    """
    return [curve for term in terms for curve in _of_weight(term.name, term.loss.weight, length)]


def _of_weight(name: str, weight: Weight, length: int) -> List[Curve]:
    numbers = list(dict.fromkeys(weight.numbers))
    auto = weight.auto

    def at(step: int) -> float:
        factor = weight.schedule(step, length)
        if auto is None:
            return factor
        ramp = min((step + 1) / auto.warmup, 1.0) if auto.warmup else 1.0
        return factor * auto.share * ramp

    steps = _steps(at, length)
    factors = [at(step) for step in steps]
    note = ''
    if auto is not None:
        # Levels keep their weights relative to each other; all of them together have the share.
        return [Curve(f"{name}: 'auto', the weight follows from the share", steps, factors, measured=True)]
    if isinstance(weight.schedule, GradientShareSchedule):
        note = ' (its first value; it follows the gradients)'
    found = []
    for number in numbers:
        levels = [str(index) for index, other in enumerate(weight.numbers) if other == number]
        of = f', level{"s" if len(levels) > 1 else ""} {", ".join(levels)}' if len(numbers) > 1 else ''
        found.append(Curve(f'{name}{of}{note}', steps, [number * factor for factor in factors]))
    return found


def _steps(at: Any, length: int) -> List[int]:
    """Iterations on which a curve is drawn: evenly spread, and both sides of each jump between them."""
    steps = sorted({round(index * (length - 1) / (POINTS - 1)) for index in range(POINTS)})
    largest = max((abs(at(step)) for step in steps), default=0.0)
    extra = set()
    for first, last in zip(steps, steps[1:]):
        while last - first > 1 and abs(at(last) - at(first)) > 0.02 * largest:
            middle = (first + last) // 2
            left, right = abs(at(middle) - at(first)), abs(at(last) - at(middle))
            extra.add(middle)
            first, last = (first, middle) if left > right else (middle, last)
        extra.update((first, last))
    return sorted({*steps, *extra})


def _matplotlib() -> Tuple[Any, Any]:
    """The figure, and the class of canvases that knows the formats; an optional package."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f'curves are drawn by matplotlib, which cannot be imported ({error}). Install it: '
                         'pip install matplotlib') from error
    return Figure, FigureCanvasBase


def check_file(file: str) -> None:
    """Refuse a name for a picture before anything is computed for it.

    Raises:
        ValueError: its ending is no format of matplotlib, it is in no folder that can be written, or matplotlib is
            missing.
    """
    _, canvas = _matplotlib()
    folder, endings = os.path.dirname(os.path.abspath(file)), sorted(canvas.filetypes)
    if os.path.splitext(file)[1].lower().removeprefix('.') not in endings:
        raise ValueError(f'--plot {file}: the ending says the format of the picture, one of {", ".join(endings)}')
    if os.path.isdir(file) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f'--plot {file} cannot be written to: give the name of a file in a folder that is there '
                         f'(looked at {folder})')


def plot(file: str, curves: Sequence[Curve], title: str, epoch: Optional[int] = None, guessed: bool = False) -> None:
    """Draw the curves.

    Args:
        file: to write; its ending says the format: .png, .pdf, .svg, ...
        curves: of :func:`curves_of`.
        title: of the picture.
        epoch: iterations of an epoch, for a training that counts epochs.
        guessed: whether that is a guess.

    Raises:
        ValueError: it cannot be written, is no format of matplotlib, or matplotlib is missing.
    """
    Figure, _ = _matplotlib()
    kinds = [kind for kind in (False, True) if any(curve.measured == kind for curve in curves)]
    figure = Figure(figsize=(9, 0.8 + 3.2 * len(kinds)), layout='constrained')
    axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axis, kind in zip(axes, kinds):
        chosen = [curve for curve in curves if curve.measured == kind]
        for curve in chosen:
            axis.plot([step / epoch if epoch else step for step in curve.steps], curve.values, label=curve.label)
        peaks = [peak for curve in chosen if (peak := max(curve.values)) > 0]
        if peaks and max(peaks) > 30 * min(peaks):  # weights of different methods differ by far
            axis.set_yscale('symlog', linthresh=min(peaks) / 100)
            axis.set_ylim(bottom=0)
        else:
            axis.set_ylim(bottom=0)
        axis.set_ylabel("share of the task's pull" if kind else 'loss_weight')
        axis.grid(alpha=0.3)
        axis.legend(loc='best', fontsize='small')
    axes[0].set_title(title)
    axes[-1].set_xlabel('iteration' if not epoch else f'epoch ({epoch} iterations each'
                        f'{", a guess: the data set was not opened" if guessed else ""})')
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise ValueError(f'the curves cannot be written to {file} (looked at {os.path.abspath(file)}): {error}'
                         ) from error
