"""What is pinned in several files is pinned to the same version."""

import importlib.util
import re
from pathlib import Path

import yaml

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
    marked = re.search(r'^MARKED := \$\(filter (.*),\$\(STACK\)\)', makefile, re.MULTILINE).group(1).split()
    assert set(setup_env.HOSTS) == set(setup_env.MMCV)
    assert marked == [stack for stack, files in setup_env.HOSTS.items() if len(files) > 1]
    for stack, files in setup_env.HOSTS.items():
        assert all(pins(name) for name in files)
        assert stack == 'upstream' or re.search(rf'^# STACK={stack} ', makefile, re.MULTILINE)
    for mark in marked:
        assert f'"{mark}: ' in (ROOT / 'pyproject.toml').read_text()
