"""tools/dev/new_method.py: what it writes passes every sweep over the methods, in a copy of the checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: The sweeps over methods and their files.
SWEEPS = ('tests/losses', 'tests/test_layering.py', 'tests/test_registry.py', 'tests/test_readme.py',
          'tests/test_golden.py', 'tests/test_configs.py', 'tests/tools/test_benchmark.py')


def run(copy, *command):
    environment = dict(os.environ, PYTHONPATH=str(copy), OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*')
            if path.is_file() and '__pycache__' not in path.parts}


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkout')
    for name in ('kd_mm', 'configs', 'docs', 'tests', 'tools'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(
            '__pycache__', '_build', 'generated'))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith('.'):
            shutil.copy(path, folder)
    return folder


def test_new_methods_pass_the_sweeps(copy):
    """One for each host that is there; the sweeps run once over both, most of their time is the start."""
    tasks = [task for task, host in (('det', 'mmdet'), ('seg', 'mmseg')) if importlib.util.find_spec(host)]
    wanted, files = [], []
    for task in tasks:
        name, cls = f'sketch_{task}', f'Sketch{task.title()}Loss'
        earlier = content(copy)
        written = run(copy, 'tools/dev/new_method.py', name, '--task', task)
        assert not written.returncode, written.stderr
        after = content(copy)
        new = {path.as_posix() for path in set(after) - set(earlier)}
        changed = {path.as_posix() for path in earlier if after[path] != earlier[path]}
        # Five places: the loss, its test, its folder of configs, the benchmark's list, the recipe; what lists
        # methods is generated, and so is the index of the configs.
        assert changed == {f'configs/benchmark/{task}.py', 'model-index.yml'}
        assert {f'kd_mm/losses/{name}.py', f'tests/losses/test_{name}.py', f'configs/{task}/{name}/README.md',
                f'configs/{task}/{name}/metafile.yml'} < new
        assert len(new) == 6 and all(name in path for path in new)
        # Each place where the author's part belongs is listed.
        listed = [line for line in written.stdout.splitlines() if 'FILL IN' in line]
        assert len(listed) == sum(text.count(b'FILL IN') for path, text in after.items()
                                  if path.as_posix() in new and path.suffix != '.yml') + 1
        wanted += [name, cls]
        files += [path for path in sorted(new) if path.endswith('.py')]

    chosen = ' or '.join([*wanted, 'entry_or_a_reason', 'every_file_has'])
    swept = run(copy, '-m', 'pytest', *SWEEPS, '-k', chosen, '--tb=short', '-o', 'addopts=--import-mode=importlib')
    assert not swept.returncode, swept.stdout[-3000:]
    assert wanted
    linted = run(copy, '-m', 'ruff', 'check', *files)
    assert not linted.returncode, linted.stdout


@pytest.mark.parametrize('arguments, message', [
    (('fgd', '--task', 'det'), 'kd_mm/losses/fgd.py'),
    (('fgd_two', '--task', 'det', '--name', 'FGDLoss'), 'kd_mm/losses/fgd.py'),
    (('Fgd', '--task', 'det'), 'small letters'), (('2fgd', '--task', 'det'), 'small letters'),
    (('other', '--task', 'det', '--name', 'Other'), 'is called ...Loss'), (('other', ), '--task')])
def test_nothing_is_overwritten(copy, arguments, message):
    earlier = content(copy)
    refused = run(copy, 'tools/dev/new_method.py', *arguments)
    assert refused.returncode == 2 and message in refused.stderr
    assert content(copy) == earlier
