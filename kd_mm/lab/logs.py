"""What a training or ``kd-mm distill`` has left in its work dir: logs, the last checkpoint, the state of a run."""

import json
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

#: What ``kd-mm distill`` keeps of a run, in its folder.
STATE = 'distill.json'


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


def checkpoints(folder: Union[str, Path]) -> List[Tuple[int, str]]:
    """(step or epoch, path) of the numbered checkpoints of a work dir, in order.

    Example:
        >>> checkpoints('no/such/folder')
        []
    """
    found = [(int(match.group(1)), str(path)) for path in Path(folder).glob('*.pth')
             if (match := re.fullmatch(r'(?:iter|epoch)_(\d+)', path.stem))]
    return sorted(found)


def last_checkpoint(folder: Union[str, Path], noted: bool = False) -> Optional[str]:
    """The last checkpoint of a work dir: the one that the host noted, else that of the highest number.

    The note has a whole path, and the folder may have been moved since: the file is looked for in this very folder.

    Args:
        folder: the work dir.
        noted: None where the host noted nothing: it does so after the first one is whole.
    """
    note = Path(folder) / 'last_checkpoint'
    if note.is_file():
        here = Path(folder) / Path(note.read_text(encoding='utf-8').strip()).name
        if here.exists():  # DeepSpeed's is a folder
            return str(here)
    elif noted:
        return None
    numbered = checkpoints(folder)
    return numbered[-1][1] if numbered else None


def read_state(folder: Union[str, Path]) -> Optional[Dict[str, Any]]:
    """What ``kd-mm distill`` noted in its folder: ``what`` was asked for, and the ``results`` so far; None without.

    Raises:
        ValueError: the file is damaged, or of something else.
    """
    file = Path(folder) / STATE
    if not file.is_file():
        return None
    try:
        state = json.loads(file.read_text(encoding='utf-8'))
    except ValueError:
        state = None
    parts = [state.get(key) for key in ('what', 'results')] if isinstance(state, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f'{file} is not what kd-mm distill writes, or was damaged, so it does not say what was done '
                         'in this folder. Take it away and choose another --work-dir')
    return dict(state)
