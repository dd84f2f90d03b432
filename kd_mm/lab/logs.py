"""The logs that a training has left in its work dir."""

import json
from pathlib import Path
from typing import Any, Dict, Iterator, Union


def log_rows(folder: Union[str, Path]) -> Iterator[Dict[str, Any]]:
    """The rows of all ``scalars.json`` of a run, those of its resumed parts after each other.

    Args:
        folder: the work dir.

    Example:
        >>> list(log_rows('no/such/folder'))
        []
    """
    for log in sorted(Path(folder).glob('*/vis_data/scalars.json')):
        yield from rows_of(log)


def rows_of(file: Path) -> Iterator[Dict[str, Any]]:
    """The rows of a file with a dict in each line.

    A row that is being written just now, or that an interruption has cut off, is left out, and so is what is none.
    """
    for line in file.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            yield row
