"""The house rules that a machine can check: imports go down only, one method has its four places, no host at import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from kd_mm.losses.base import KDLoss
from kd_mm.registry import MODELS, choices

ROOT = Path(__file__).resolve().parent.parent
#: From the bottom up; a module may import from its own layer's left and from every layer below.
LAYERS = (
    ('version', 'swap'), ('registry', 'types', 'modes', 'problems', 'checks'),
    ('schedules', 'functional', 'checkpoint', 'distributed', 'synthetic', 'places', 'levels'), ('blocks', 'norms'),
    ('targets', 'taps'), ('adapters', 'regions', 'views'), ('losses', ), ('teacher', ), ('peer', ),
    ('teacher_sources', ), ('engine', ), ('terms', 'distiller'), ('hooks', ),
    ('inspection', 'benchmark', 'learning'))
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def modules():
    return sorted(path for path in (ROOT / 'kd_mm').rglob('*.py') if path.parent != ROOT / 'kd_mm'
                  or path.name != '__init__.py')


def imported(node):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'kd_mm':
        parts = node.module.split('.')
        return [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return [alias.name.split('.')[1] for alias in node.names if alias.name.startswith('kd_mm.')]
    return []


@pytest.mark.parametrize('path', modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = path.relative_to(ROOT / 'kd_mm').parts[0].removesuffix('.py')
    assert own in RANK, f'{own}: give the new module a place in LAYERS'
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for name in imported(node):
            assert name == own or RANK[name] <= RANK[own], f'{path}:{node.lineno} imports {name}, which is above {own}'
    nested = [node.lineno for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.Lambda))
              for node in ast.walk(function) if imported(node)]
    assert not nested, f'{path}: imports of kd_mm inside functions at lines {nested}'


@pytest.mark.parametrize('statement', [
    'import kd_mm', 'import kd_mm.registry', 'import kd_mm.hooks, kd_mm.losses, kd_mm.distiller'])


def test_no_host_is_imported(statement):
    code = f'{statement}; import sys; found = {{"mmdet", "mmseg"}} & set(sys.modules); assert not found, found'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


def stem(name):
    module = MODELS.module_dict[name].__module__
    return module.rsplit('.', 1)[1]


@pytest.mark.parametrize('name', choices(KDLoss))
def test_every_method_has_its_four_places(name):
    method = stem(name)
    assert (ROOT / 'kd_mm' / 'losses' / f'{method}.py').is_file()
    assert (ROOT / 'tests' / 'losses' / f'test_{method}.py').is_file()
    folders = [folder for folder in ROOT.glob(f'configs/*/{method}') if (folder / 'README.md').is_file()]
    assert folders and any(list(folder.glob('*.py')) for folder in folders), f'configs/det|seg/{method}'
    assert f'`{name}`' in (ROOT / 'README.md').read_text()


def test_docstrings_of_public_classes():
    from mmengine.registry import HOOKS  # noqa: F401
    for name, cls in MODELS.module_dict.items():
        text = cls.__doc__ or ''
        assert len(text) > 80, name
        if issubclass(cls, KDLoss):
            for section in ('Args:', 'Returns:', 'Example:'):
                assert section in text, f'{name}: {section}'
