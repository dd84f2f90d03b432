"""What is pinned in several files is pinned to the same version."""

import importlib.util
import re
import subprocess
import venv
from pathlib import Path
from types import SimpleNamespace

import yaml
from conftest import ON_FORKS, pytest_collection_modifyitems

import kd_mm

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location('setup_env', ROOT / 'tools' / 'dev' / 'setup_env.py')
setup_env = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(setup_env)


def pins(name):
    lines = (ROOT / 'tools' / 'env' / f'requirements-{name}.txt').read_text().splitlines()
    return dict(re.match(r'([\w.-]+)==(\S+)', line).groups() for line in lines if '==' in line and line[0] != '#')


def test_the_image_is_what_the_set_up_makes(monkeypatch):
    arguments = dict(re.findall(r'^ARG (\w+)=(\S+)$', (ROOT / 'Dockerfile').read_text(), re.MULTILINE))
    monkeypatch.delenv('KD_MM_TORCH', raising=False)
    SPEC.loader.exec_module(setup_env)
    assert arguments['KD_MM_TORCH'] == setup_env.TORCH
    assert arguments['STACK'] in setup_env.MMCV
    assert re.fullmatch(r'python:3\.1[012]-slim-\w+', arguments['BASE'])
    # Nothing else is installed by it: every other pin is the script's own.
    installs = [line for line in (ROOT / 'Dockerfile').read_text().splitlines() if 'install' in line and line[0] != '#']
    assert len(installs) == 1 and 'apt-get install' in installs[0]


def test_pre_commit_runs_the_linter_of_the_set_up():
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos'][0]['hooks']
    wanted = [text.split('==') for hook in hooks for text in hook['additional_dependencies']]
    assert ['ruff', pins('base')['ruff']] in wanted
    assert all(pins('base')[name] == version for name, version in wanted)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == kd_mm.__version__ and citation['license'] == 'Apache-2.0'


def test_every_stack_has_its_pins_and_its_line_in_the_makefile():
    makefile = (ROOT / 'Makefile').read_text()
    marked = re.search(r'^MARKED := .*\$\(filter (.*),\$\(STACK\)\)', makefile, re.MULTILINE).group(1).split()
    assert marked == [*setup_env.ON_TOP, 'onedl'] and set(setup_env.ON_TOP.values()) <= set(setup_env.MMCV)
    for stack in setup_env.STACKS:
        assert pins(stack)
        assert stack == 'upstream' or re.search(rf'^# STACK={stack} ', makefile, re.MULTILINE)
    for mark in marked:
        assert f'"{mark}: ' in (ROOT / 'pyproject.toml').read_text()


def test_what_is_tested_on_the_forks_is_there_and_marked():
    folder = ROOT / 'tests'
    assert all((folder / name).exists() for name in ON_FORKS) and list(ON_FORKS) == sorted(ON_FORKS)
    marked = []
    pytest_collection_modifyitems([
        SimpleNamespace(path=path, add_marker=lambda mark, path=path: marked.append((path, mark)))
        for path in folder.rglob('test_*.py')])
    assert {mark for _, mark in marked} == {'onedl'} and {
        next(name for name in ON_FORKS if path.relative_to(folder).as_posix().startswith(name))
        for path, _ in marked} == set(ON_FORKS)
    assert folder / 'hosts' / 'heads' / 'test_dense.py' in dict(marked) and Path(__file__) not in dict(marked)


def test_an_environment_on_top_of_another(tmp_path, monkeypatch):
    """It finds what is below it and holds what is its own, kd_mm included; a second call has nothing to do."""
    monkeypatch.setattr(setup_env, 'ROOT', tmp_path)
    monkeypatch.setattr(setup_env, 'SPECS', tmp_path / 'env')
    below = tmp_path / '.venv'
    venv.create(below, symlinks=True)
    (below / 'foundation').mkdir()
    packages = next(below.glob('lib/python*/site-packages'))
    (packages / 'of_the_base.py').write_text('')
    editable = tmp_path / 'elsewhere'
    editable.mkdir()
    (editable / 'editable_there.py').write_text('')
    (packages / 'editable.pth').write_text(f'{editable}\n')
    asked = []
    monkeypatch.setattr(setup_env, 'fingerprint', lambda stack: f'what {stack} holds')
    monkeypatch.setattr(setup_env, 'set_up_whole', lambda *args: asked.append(args))
    own = setup_env.run
    # Without an index: what pip would be asked for.
    monkeypatch.setattr(setup_env, 'run', lambda command: asked.append(tuple(map(str, command[4:])))
                        if 'pip' in command else own(command))
    top = tmp_path / '.venv-yolo'
    for _ in range(2):
        setup_env.set_up('yolo', top, 1)
    assert asked[0] == ('upstream', below, 1) and len(asked) == 3
    assert asked[1][-2:] == ('-r', str(tmp_path / 'env' / 'requirements-yolo.txt')) and '--editable' in asked[2]
    code = 'import of_the_base, editable_there, sys; print(sys.prefix)'
    output = subprocess.run([top / 'bin' / 'python', '-c', code], capture_output=True, text=True)
    assert output.stdout.strip() == str(top), output.stderr
    assert (top / 'foundation').resolve() == below / 'foundation'
