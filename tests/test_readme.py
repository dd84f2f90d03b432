"""The README is executed: its configs train a step, its commands exist with the flags it shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from mmengine.config import Config
from shipped import train_one_step
from stock import tool

from kd_mm.hosts.zoo import package_folder, zoo_config
from kd_mm.lab.commands.app import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', README, re.DOTALL)
CONFIGS = [text for language, text in BLOCKS if language == 'python']
COMMANDS = [line.split('#')[0].strip() for language, text in BLOCKS if language == 'bash'
            for line in text.splitlines() if line.strip()]


def test_every_block_is_known():
    assert {language for language, _ in BLOCKS} == {'bash', 'python'}
    assert len(CONFIGS) == 2 and len(COMMANDS) >= 6


@pytest.mark.parametrize('text', CONFIGS, ids=['detection', 'segmentation'])
def test_config_trains_a_step(text, tmp_path):
    found = re.search(r"_base_ = '(\w+)::(.*)'", text)
    if package_folder('mmseg') and found.group(1) == 'mmseg':
        # The lookup of `mmseg::` by mmengine fails with the forks; the file it names is the same.
        text = text.replace(found.group(0), f'_base_ = {str(zoo_config("::".join(found.groups())))!r}')
    path = tmp_path / 'mine.py'
    path.write_text(text)
    cfg = Config.fromfile(str(path))
    _, look, names = train_one_step(cfg, tmp_path)
    assert all(look.losses[name] > 0 and look.gradients[name] > 0 for name in names)


@pytest.mark.parametrize('command', sorted(set(COMMANDS)))
def test_command_exists(command, monkeypatch, capsys):
    words = command.split()
    if words[0] == 'make':
        rules = (ROOT / 'Makefile').read_text()
        assert re.search(rf'^{words[1]}:', rules, re.MULTILINE)
    elif words[0] == 'kd-mm':
        monkeypatch.setattr(sys, 'argv', ['kd-mm'])
        result = CliRunner().invoke(cli, [words[1], '--help'], prog_name='kd-mm')
        assert not result.exit_code and all(word in result.output for word in words if word.startswith('--'))
    elif words[0] == 'python':
        monkeypatch.setattr(sys, 'argv', [words[1], '--help'])
        with pytest.raises(SystemExit) as end:
            tool(Path(words[1]).stem).main()
        shown = capsys.readouterr().out
        assert not end.value.code and all(word in shown for word in words if word.startswith('--')), shown
    else:
        assert command == 'pip install -e .' and (ROOT / 'setup.py').is_file()


def test_tools_and_flags_in_the_text():
    for name in set(re.findall(r'tools/(\w+\.(?:py|sh))', README)):
        assert (ROOT / 'tools' / name).is_file(), name
    makefile = (ROOT / 'Makefile').read_text()
    for variable in set(re.findall(r'make \w+ (\w+)=', README)):
        assert variable in makefile


def test_sub_commands_in_the_text():
    from kd_mm.lab.commands.app import FORWARDED, OWN
    named = set(re.findall(r'`kd-mm (\w+)', README))
    assert named == {*FORWARDED, *OWN}


def test_method_table_is_generated():
    subprocess.run([sys.executable, str(ROOT / 'tools' / 'dev' / 'readme_methods.py'), '--check'], check=True)


def test_documented_keys_are_the_hooks_own():
    from kd_mm.engine.hook import DistillHook
    from kd_mm.engine.term import TAP_KEYS
    from kd_mm.registry import accepted_arguments
    for name in [*accepted_arguments(DistillHook), *TAP_KEYS]:
        assert f'`{name}`' in README, name


def test_every_adapter_region_and_schedule_is_named():
    from kd_mm.adapters.base import Adapter
    from kd_mm.ops.schedules import Schedule
    from kd_mm.regions.base import RegionMask
    from kd_mm.registry import choices
    for base in (Adapter, RegionMask, Schedule):
        for name in choices(base):
            assert re.search(rf'\b{name}\b', README), name


@pytest.mark.parametrize('path', sorted(ROOT.glob('*.md')) + sorted((ROOT / 'configs').rglob('*.md')),
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_number_from_memory_in_a_table(path):
    rows = [line for line in path.read_text().splitlines() if line.startswith('|') and re.search(r'\d', line)]
    assert [row for row in rows if re.search(r'from memory|recalled|remember|unsourced|unchecked', row)] == []
