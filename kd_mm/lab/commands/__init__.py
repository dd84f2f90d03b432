"""What a user types: ``kd-mm SUB-COMMAND``, one module a sub-command; ``kd-mm`` alone lists them."""

import os
import sys
from typing import NoReturn, Tuple, Type

import click

#: What a user may have given that cannot be used: a command ends with the message of one of these.
REFUSALS: Tuple[Type[Exception], ...] = (KeyError, OSError, ValueError)

#: Commands behind whose ``--`` flags of ``kd-mm train`` stand.
HANDING_ON = ('distill', 'pretrain')


def program() -> str:
    """What was typed, as messages begin: ``kd-mm train``, ``train.py``."""
    context = click.get_current_context(silent=True)
    return context.command_path if context is not None else os.path.basename(sys.argv[0])


def option(text: str) -> str:
    """A flag of ``kd-mm train`` as it is written for the command that runs: behind ``--`` of those that hand it on."""
    return f'-- {text}' if program().split(' ')[-1] in HANDING_ON else text


def fail(message: object) -> NoReturn:
    """End with a message instead of a traceback: what is wrong is the user's to mend, and the message says how."""
    raise SystemExit(f'{program()}: {words(message)}')


def words(message: object) -> object:
    """An error as a user reads it."""
    if isinstance(message, OSError) and message.errno is not None and message.filename is not None:
        return f'{message.filename}: {message.strerror}'  # of the system
    return message.args[0] if isinstance(message, KeyError) and message.args else message
