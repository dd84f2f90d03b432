"""Collects everything that is wrong with a configuration into one error."""

from typing import Any, List, Sequence


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
