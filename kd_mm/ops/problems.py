"""Collects everything that is wrong with a configuration into one error."""

from contextlib import contextmanager
from typing import Any, Iterator, List, Sequence

import torch


class ConfigProblems(ValueError):
    """A configuration is wrong; ``found`` has one sentence for each problem."""

    def __init__(self, message: str, found: Sequence[str] = ()):
        super().__init__(message)
        self.found = list(found)


class Problems:
    """Everything that is wrong with a configuration, for one error."""

    def __init__(self) -> None:
        self.found: List[str] = []

    def add(self, problem: Any) -> None:
        text = problem.args[0] if isinstance(problem, (KeyError, ValueError)) and problem.args else str(problem)
        if text not in self.found:
            self.found.append(str(text))

    def raise_any(self) -> None:
        if self.found:
            lines = '\n'.join(f'  {number}. {text}' for number, text in enumerate(self.found, 1))
            raise ConfigProblems(f'kd_mm: {len(self.found)} problem(s) in the distillation config:\n{lines}',
                                 self.found)


@contextmanager
def named(owner: str, contract: str) -> Iterator[None]:
    """Say whose an error is, unless it does: for parts that a user may have written.

    Args:
        owner: name of the class that runs inside.
        contract: a sentence on what it is given and has to return.

    Raises:
        ValueError: what runs inside fails.

    Example:
        >>> with named('MyRegion', 'It returns weights'):
        ...     None.shape
        Traceback (most recent call last):
        ValueError: MyRegion fails: AttributeError: 'NoneType' object has no attribute 'shape'. It returns weights
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:  # not of the part; torch.OutOfMemoryError is younger than the oldest torch here
        raise
    except Exception as error:
        if owner in str(error):
            raise
        raise ValueError(f'{owner} fails: {type(error).__name__}: {error}. {contract}') from error
