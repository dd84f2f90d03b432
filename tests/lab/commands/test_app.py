"""``kd-mm``: what it lists is there, words go on to the sub-command, and the scripts in tools/ are the same."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from stock import COMMANDS

from kd_mm import __version__
from kd_mm.lab.commands.app import CONTINUED, FORWARDED, OWN, cli

ROOT = Path(__file__).resolve().parents[3]


def kd_mm(*words):
    return CliRunner().invoke(cli, list(map(str, words)), prog_name='kd-mm')


def test_the_list_comes_without_torch():
    code = ('import sys\nfrom kd_mm.lab.commands.app import cli\ncli(["--help"], standalone_mode=False)\n'
            'assert not {"torch", "mmengine"} & set(sys.modules)')
    shown = subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f'  {name} ' in shown for name in [*FORWARDED, *OWN])


def test_version_and_unknown_words():
    assert kd_mm('--version').output == f'kd-mm, version {__version__}\n'
    assert kd_mm('distil').exit_code == 2 and "No such command 'distil'" in kd_mm('distil').output


@pytest.mark.parametrize('name', [*FORWARDED, *OWN])
def test_every_sub_command_has_help(name, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['pytest'])  # it is put back
    result = kd_mm(name, '--help')
    assert result.exit_code == 0 and f'usage: kd-mm {name}' in result.output.lower()


def test_flags_of_the_host_and_messages_go_through(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['pytest'])
    result = kd_mm('train', 'nowhere.py', '--cfg-options', 'a=1', 'b.c="[2,3]"', '--amp')
    assert result.exit_code == 1 and 'kd-mm train: no such config: nowhere.py' in str(result.exception or result.output)


@pytest.mark.parametrize('name', ['distill', 'train', 'methods'])
def test_after_an_interruption_it_is_said_how_it_goes_on(name, monkeypatch):
    def stopped(self, ctx):
        raise KeyboardInterrupt

    monkeypatch.setattr(click.Command, 'invoke', stopped)
    result = kd_mm(name, *(['a.py', '--teacher', 'b.py'] if name == 'distill' else []))
    assert result.exit_code == 130 and f'kd-mm {name}: interrupted' in result.output
    assert ('continues' in result.output) == (name in CONTINUED) and set(CONTINUED) < {*FORWARDED, *OWN}


@pytest.mark.parametrize('script, name', COMMANDS.items())
def test_the_scripts_forward(script, name):
    text = (ROOT / 'tools' / f'{script}.py').read_text()
    assert f'from kd_mm.lab.commands.{name} import main' in text and len(text.splitlines()) <= 10 and name in FORWARDED
