"""What a user types: ``kd-mm SUB-COMMAND``, one module a sub-command; ``kd-mm`` alone lists them."""

import os
import sys
from typing import NoReturn

import click


def program() -> str:
    """What was typed, as messages begin: ``kd-mm train``, ``train.py``."""
    context = click.get_current_context(silent=True)
    return context.command_path if context is not None else os.path.basename(sys.argv[0])


def fail(message: object) -> NoReturn:
    """End with a message instead of a traceback: what is wrong is the user's to mend, and the message says how."""
    raise SystemExit(f'{program()}: {message.args[0] if isinstance(message, KeyError) else message}')
