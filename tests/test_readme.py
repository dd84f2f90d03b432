"""The README and the pages of the site are executed: configs load and train, commands exist with the flags shown."""

import ast
import itertools
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from mmengine.config import Config
from shipped import train_one_step
from stock import tool

from kd_mm.hosts.zoo import package_folder, zoo_config
from kd_mm.lab.commands.app import cli
from tools.dev.docs_pages import survey_commands

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (
    ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))}
BLOCKS = {name: re.findall(r'^```(\w+)\n(.*?)^```', text, re.DOTALL | re.MULTILINE) for name, text in PAGES.items()}
EVERY = '\n'.join(PAGES.values())
CONFIGURATION = PAGES['docs/configuration.md']
CONFIGS = [text for language, text in BLOCKS['README.md'] if language == 'python']
COMMANDS = [line.split('#')[0].strip() for blocks in BLOCKS.values() for language, text in blocks if language == 'bash'
            for line in text.splitlines() if line.split('#')[0].strip()]


def test_every_block_is_known():
    assert {language for blocks in BLOCKS.values() for language, _ in blocks} <= {'bash', 'python', 'text'}
    assert len(CONFIGS) == 2 and len(COMMANDS) >= 6


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for name, text in PAGES.items():
        for link in re.findall(r'\]\(([^)#]+)[^)]*\)', text):
            # What is generated is looked at when the site is built.
            assert '://' in link or 'generated/' in link or (ROOT / name).parent.joinpath(link).exists(), (name, link)


@pytest.mark.parametrize('name', [name for name in PAGES if name != 'README.md'])
def test_configs_of_the_pages_load(name, tmp_path, monkeypatch):
    """Every block that is a config, in a folder with those of the same page that it names; every type exists."""
    from kd_mm.registry import MODELS, TEACHERS
    monkeypatch.chdir(tmp_path)
    for count, (language, text) in enumerate(BLOCKS[name]):
        if language != 'python':
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'dict':
                kind = next((item.value for item in node.keywords if item.arg == 'type'), None)
                if kind is not None and kind.value.endswith(('Loss', 'Adapter', 'Region', 'Schedule', 'Teacher')):
                    assert MODELS.get(kind.value) or TEACHERS.get(kind.value) or f'class {kind.value}(' in EVERY, kind
        found = re.match(r'# (\w+\.py)\n', text)
        file = tmp_path / (found.group(1) if found else f'block_{count}.py')
        file.write_text(text)
        base = re.search(r"_base_ = '(\w+)::(.*)'", text)
        if base and package_folder(base.group(1)) is None:  # a host with an environment of its own
            continue
        if base and package_folder('mmseg') and base.group(1) == 'mmseg':
            file.write_text(text.replace(base.group(0), f'_base_ = {str(zoo_config("::".join(base.groups())))!r}'))
        if '_base_ = ' in text:
            local = re.search(r"_base_ = '(?:\./)?(\w+\.py)'", text)
            if local and not (tmp_path / local.group(1)).exists():
                (tmp_path / local.group(1)).write_text('')
            assert Config.fromfile(str(file), import_custom_modules=False)


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
    words = command.split(' -- ')[0].split()
    words = list(itertools.dropwhile(lambda word: re.match(r'[A-Z_]+=', word), words))
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
    elif words[0].endswith('.sh'):
        assert (ROOT / words[0]).is_file()
    elif words[0] in ('torchrun', 'srun', 'mpirun'):
        monkeypatch.setattr(sys, 'argv', ['kd-mm'])
        shown = CliRunner().invoke(cli, ['train', '--help'], prog_name='kd-mm').output
        assert '--launcher' in words and f'--launcher {words[-1]}' in shown
    else:
        assert words[:2] == ['pip', 'install'] and (ROOT / 'setup.py').is_file()


def test_tools_and_flags_in_the_text():
    for name in set(re.findall(r'tools/(\w+\.(?:py|sh))', EVERY)):
        assert (ROOT / 'tools' / name).is_file(), name
    makefile = (ROOT / 'Makefile').read_text()
    for variable in set(re.findall(r'make \w+ (\w+)=', EVERY)):
        assert variable in makefile


def test_sub_commands_in_the_text():
    from kd_mm.lab.commands.app import FORWARDED, OWN
    assert set(re.findall(r'`kd-mm (\w+)', EVERY)) <= {*FORWARDED, *OWN}


def test_documented_keys_are_the_hooks_own():
    from kd_mm.engine.hook import DistillHook
    from kd_mm.engine.term import TAP_KEYS
    from kd_mm.registry import accepted_arguments
    for name in [*accepted_arguments(DistillHook), *TAP_KEYS]:
        assert f'`{name}`' in CONFIGURATION, name


def test_every_adapter_region_and_schedule_is_named():
    from kd_mm.adapters.base import Adapter
    from kd_mm.ops.schedules import Schedule
    from kd_mm.regions.base import RegionMask
    from kd_mm.registry import choices
    for base in (Adapter, RegionMask, Schedule):
        for name in choices(base):
            assert re.search(rf'\b{name}\b', CONFIGURATION), name


def test_every_name_in_the_log_is_explained():
    sources = '\n'.join(path.read_text() for path in (ROOT / 'kd_mm' / 'engine').rglob('*.py'))
    logged = set(re.findall(r"'(kd_[a-z]+_)\{", sources)) | set(re.findall(r"result\['(kd_\w+)'\]", sources))
    assert 'kd_task_ratio' in logged and len(logged) >= 4
    page = PAGES['docs/log.md']
    assert [name for name in logged if f'`{name}NAME`' not in page and f'`{name}`' not in page] == []


def test_the_survey_names_what_there_is():
    from kd_mm.losses.base.loss import KDLoss
    from kd_mm.registry import choices
    survey = PAGES['docs/survey.md']
    assert set(re.findall(r'`(\w+Loss)`', survey)) <= set(choices(KDLoss))
    rows = [line.strip('| ').split(' | ') for line in survey.splitlines() if re.match(r'\| (?!branch)', line)]
    assert len(rows) > 60
    for branch, stands, *command in rows:  # whatever stays out says why, all others can be seen
        assert re.match(r'out: \w+ \w+', stands) if not command else survey_commands(command[0]), branch


@pytest.mark.parametrize('command', sorted(set(survey_commands(PAGES['docs/survey.md']))))
def test_every_command_of_the_survey_can_be_typed(command, monkeypatch):
    """Without a placeholder: the sub-command has these flags, its configs are there, and its overrides fit."""
    _, name, *words = command.split()
    assert not re.search(r'\b[A-Z]{3,}\b', command)
    monkeypatch.setattr(sys, 'argv', ['kd-mm'])
    result = CliRunner().invoke(cli, [name, '--help'], prog_name='kd-mm')
    assert not result.exit_code and all(word in result.output for word in words if word.startswith('--'))
    for word in words:
        if word.endswith('.py'):
            file = zoo_config(word) if '::' in word else ROOT / word
            cfg = Config.fromfile(str(file))
            for option in words[words.index('--cfg-options') + 1:] if '--cfg-options' in words else ():
                key, value = option.split('=')
                cfg.merge_from_dict({key: int(value)})
                dataset = cfg.train_dataloader.dataset
                assert dataset.indices == int(value) and dataset.type == 'CocoDataset'  # an argument of BaseDataset


PLACES = [*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md'), *(ROOT / 'configs').rglob('*.md')]


@pytest.mark.parametrize('path', sorted(PLACES),
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_number_from_memory_in_a_table(path):
    rows = [line for line in path.read_text().splitlines() if line.startswith('|') and re.search(r'\d', line)]
    assert [row for row in rows if re.search(r'from memory|recalled|remember|unsourced|unchecked', row)] == []
