"""Configs of ours that had another name once: whoever asks for the old one is told the new one."""

import functools
import json
import os
from pathlib import Path
from typing import Dict

#: Old path below ``configs`` -> new path.  Written once, when every config got a name of its own; it does not grow.
TABLE = Path(__file__).with_suffix('.json')


@functools.lru_cache(maxsize=None)
def renamed() -> Dict[str, str]:
    """The content of :data:`TABLE`."""
    return dict(json.loads(TABLE.read_text(encoding='utf-8')))


def hint(text: str) -> str:
    """A sentence with the new name of the old config that a text names; '' if it names none.

    Args:
        text: a path, or a message with one in it.

    Example:
        >>> hint('repo/configs/profile/pspnet_teacher.py is not there')
        '. It has a new name: configs/profile/pspnet_cwd_teacher.py'
        >>> hint('repo/configs/mine.py is not there')
        ''
    """
    text = text.replace(os.sep, '/')
    found = [new for old, new in renamed().items() if f'/{old}' in f'/{text}']
    if found:
        return f'. It has a new name: configs/{found[0]}'
    shared = [new for old, new in renamed().items() if text == os.path.basename(old)]
    if not shared:
        return ''
    return (f'. Configs of ours have new names; {len(shared)} had this one: ' if len(shared) > 1 else
            '. It has a new name: ') + ', '.join(f'configs/{new}' for new in shared)


def no_such_config(path: str) -> str:
    """The message for a config that does not exist: as it was written, where it was looked for, its new name."""
    place = os.path.abspath(os.path.expanduser(path))
    return f'no such config: {path} (looked at {place}){hint(place) or hint(path)}'
