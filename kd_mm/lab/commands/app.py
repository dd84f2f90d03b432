"""The command ``kd-mm``: a sub-command is imported when it is asked for, so that the list of them comes at once."""

import importlib
import sys
import warnings
from typing import Any, Dict, List, Optional

import click

import kd_mm

#: Sub-commands over a parser of their own, which they share with the scripts of ``tools/``: name -> what it does.
FORWARDED: Dict[str, str] = {
    'check': 'All that can go wrong with a config, before the first step.',
    'taps': 'The modules of a model that a loss can tap, with shapes.',
    'profile': 'Time and memory of a distilled step, term by term.',
    'train': 'Train a config, with or without distillation.',
    'test': 'Evaluate a checkpoint.',
    'export': 'Write the plain student of a distilled checkpoint.',
}
#: The others: each is the click command ``command`` of its module.
OWN: Dict[str, str] = {
    'distill': 'Choose losses, train, evaluate, export, report: all of it.',
    'init': 'Write the config of a distillation, with a recipe for the pair.',
    'pretrain': 'Let a backbone learn from a teacher on pictures without labels.',
    'split': 'Split a data set into the steps of a training whose classes grow.',
    'report': 'Where the student still loses against its teacher: a page, and what to try next.',
    'compare': 'Scores over runs and seeds: do they show a difference?',
    'recipes': 'The recipes that there are.',
    'methods': 'Every loss: what it compares, what it needs, where it stands in our tables.',
    'doctor': 'What is installed, what does not fit together, and the mend.',
}
#: How what takes long goes on after Ctrl-C.
CONTINUED: Dict[str, str] = {
    'distill': 'the same command again continues with what is missing',
    'train': 'the same command with --resume continues from the last checkpoint',
    'pretrain': 'the same command with --resume continues from the last checkpoint',
}
#: Exit status of what Ctrl-C has ended, as in a shell.
INTERRUPTED = 130


class Commands(click.Group):
    """A group whose members are imported when they are used."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            name = ctx.invoked_subcommand or ''
            click.echo(f'\nkd-mm {name}: interrupted' + (f'; {CONTINUED[name]}' if name in CONTINUED else ''), err=True)
            sys.exit(INTERRUPTED)

    def list_commands(self, ctx: click.Context) -> List[str]:
        return [*OWN, *FORWARDED]

    def get_command(self, ctx: click.Context, name: str) -> Optional[click.Command]:
        if name in FORWARDED:
            return forwarded(name)
        return importlib.import_module(f'kd_mm.lab.commands.{name}').command if name in OWN else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, group in (('From a big model to a better small one', OWN), ('Step by step', FORWARDED)):
            if group:
                with formatter.section(title):
                    formatter.write_dl(list(group.items()))


def forwarded(name: str) -> click.Command:
    """A sub-command that hands all its words to the parser of its module."""

    @click.command(name, help=FORWARDED[name], add_help_option=False,
                   context_settings=dict(ignore_unknown_options=True, allow_interspersed_args=False))
    @click.argument('words', nargs=-1, type=click.UNPROCESSED)
    def command(words: Any) -> None:
        sys.argv = [f'kd-mm {name}', *words]  # usage and messages begin with it
        sys.exit(importlib.import_module(f'kd_mm.lab.commands.{name}').main(list(words)))

    return command


@click.group(cls=Commands, context_settings=dict(help_option_names=['-h', '--help']))
@click.version_option(kd_mm.__version__, prog_name='kd-mm')
def cli() -> None:
    """Knowledge distillation for MMDetection 3.x and MMSegmentation 1.x.

    `kd-mm SUB-COMMAND --help` says the rest.
    """


def run() -> None:
    """What the console calls."""
    # The host says it at every start, and no user of it can mend it.
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
    cli(prog_name='kd-mm')
