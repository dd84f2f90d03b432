"""``speed='tune'``: the forms of a teacher are tried in turn in the first steps, and the fastest is kept."""

import dataclasses
import math
import statistics
from typing import Any, Dict, List, Mapping, Tuple

import torch

from kd_mm.ops import distributed
from kd_mm.teachers.speed import Speed

#: How often each form is tried; the first time of each does not count: kernels and caches settle.
ROUNDS = 4


class Tuning:
    """Which form is tried in a step, and which one was the fastest.

    Args:
        forms: the candidates; the first is the host's own forward.
    """

    def __init__(self, forms: List[Speed]):
        self.forms = forms
        #: seconds a million numbers of the input, for each form.
        self.times: List[List[float]] = [[] for _ in forms]

    @property
    def done(self) -> bool:
        """Whether every form was tried often enough."""
        return all(len(times) >= ROUNDS for times in self.times)

    def next(self) -> int:
        """Number of the form that is to be tried."""
        return min(range(len(self.forms)), key=lambda number: len(self.times[number]))

    def note(self, number: int, seconds: float, size: int) -> None:
        """A form has taken so long for a batch of ``size`` numbers."""
        self.times[number].append(seconds / size * 1e6)

    def leave_out(self, number: int) -> None:
        """A form fails here: it is never the fastest, on no rank.

        It keeps its turns, so that all ranks choose in the same step.
        """
        self.times[number].append(math.inf)

    def fails(self, number: int) -> bool:
        """Whether a form was left out."""
        return math.inf in self.times[number]

    def result(self, device: torch.device) -> Tuple[Speed, str]:
        """The form with the lowest median, and a table of all; ``device``: where the ranks exchange them."""
        medians = [math.inf if math.inf in times else statistics.median(times[1:]) for times in self.times]
        if distributed.world_size() > 1:  # the same choice everywhere
            medians = distributed.mean(torch.tensor(medians, device=device)).tolist()
        best = medians.index(min(medians))
        lines = [f'  {1e3 * median:9.3f}  {median / medians[0]:5.2f}  {form.words}{" <-" if number == best else ""}'
                 for number, (form, median) in enumerate(zip(self.forms, medians))]
        head = 'milliseconds for a million numbers of the input, and relative to the first form:'
        return self.forms[best], '\n'.join([head, *lines])

    def state(self) -> List[Dict[str, Any]]:
        """For a resume in the middle of it."""
        return [dict(form=dataclasses.asdict(form), times=list(times)) for form, times in zip(self.forms, self.times)]

    def load(self, state: List[Mapping[str, Any]]) -> None:
        """Restore :meth:`state`."""
        self.forms = [Speed(**entry['form']) for entry in state]
        self.times = [list(entry['times']) for entry in state]


def candidates(chosen: Speed) -> List[Speed]:
    """The host's own forward, and every form of folding and layout with the rest of what was chosen by rule.

    Without what did not hold on the first batch.
    """
    rest = dataclasses.replace(chosen, fold=False, channels_last=False)
    forms = [dataclasses.replace(rest, attention=False, onednn=False)]
    forms += [dataclasses.replace(rest, fold=fold, channels_last=layout)
              for fold in sorted({False, chosen.fold}) for layout in sorted({False, chosen.channels_last})]
    return list(dict.fromkeys(forms))
