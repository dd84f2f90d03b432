"""The house rules that a machine can check: imports go down only, one method has its four places, no host at import."""

import ast
import collections
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from kd_mm.losses.base.loss import KDLoss
from kd_mm.registry import MODELS, choices

ROOT = Path(__file__).resolve().parents[1]
#: The floors, from the bottom up; a module may import from its own room and from every floor below.
LAYERS = (
    ('registry', ), ('ops', ), ('types', ), ('adapters', 'regions', 'hosts'), ('losses', 'teachers'), ('engine', ),
    ('lab', ))
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
#: One-line modules on the roof: old names, gone after a release, and Python's name for the command.
FORWARDERS = ('hooks', 'distiller', '__main__')
LONGEST = 500


def modules():
    return sorted(path for path in (ROOT / 'kd_mm').rglob('*.py') if path != ROOT / 'kd_mm' / '__init__.py')


def dotted(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def imported(node):
    """Modules of kd_mm that a statement imports, as far as the name goes."""
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'kd_mm':
        return [f'{node.module}.{alias.name}' for alias in node.names]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.startswith('kd_mm.')]
    return []


@pytest.mark.parametrize('path', modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = path.relative_to(ROOT / 'kd_mm').parts[0].removesuffix('.py')
    assert own in RANK or own in FORWARDERS, f'{own}: give the new room a floor in LAYERS'
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for name in imported(node):
            room = name.split('.')[1]
            assert room == own or RANK[room] < RANK.get(own, len(LAYERS)), (
                f'{path}:{node.lineno} imports {name}, which is not below {own}')
    nested = [node.lineno for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.Lambda))
              for node in ast.walk(function) if imported(node)]
    assert not nested, f'{path}: imports of kd_mm inside functions at lines {nested}'


def test_the_house_is_small():
    rooms = {path.name.removesuffix('.py') for path in (ROOT / 'kd_mm').iterdir()
             if path.suffix == '.py' or (path / '__init__.py').is_file()} - {'__init__', *FORWARDERS}
    assert rooms == set(RANK) and len(rooms) <= 10 and len(LAYERS) <= 7
    files = [path for folder in ('kd_mm', 'tools') for path in (ROOT / folder).rglob('*.py')]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {path: count for path, count in lines.items() if count > LONGEST}
    for name in FORWARDERS:
        assert len((ROOT / 'kd_mm' / f'{name}.py').read_text().splitlines()) <= 5


def test_the_picture_of_the_floors_is_this_table():
    text = (ROOT / 'ARCHITECTURE.md').read_text()
    picture = text.split('Floors, from the bottom.')[1].split('```')[1]
    assert [tuple(line.split()) for line in picture.strip().splitlines()] == list(reversed(LAYERS))


def test_scripts_and_helpers_of_tests_have_names_of_their_own():
    """Tests import both by their bare names, and in one process the first of a name is what all get."""
    folders = ['tests', 'tests/helpers', 'tools', 'tools/studies', 'tools/dev']
    names = collections.Counter(path.stem for folder in folders for path in (ROOT / folder).glob('*.py'))
    assert names['chains'] and names['benchmark'] and names['write_numbers']  # each folder is found
    assert [name for name, count in names.items() if count > 1] == []


def test_no_circle_of_modules():
    known = {dotted(path): path for path in modules()}
    arrows = {}
    for name, path in known.items():
        found = {target for node in ast.walk(ast.parse(path.read_text())) for target in imported(node)}
        # `from package import name` may mean the module or something in it.
        found = {target if target in known else target.rpartition('.')[0] for target in found}
        arrows[name] = found & set(known) - {name}
    done, path = set(), []

    def visit(name):
        assert name not in path, ' -> '.join([*path[path.index(name):], name])
        if name not in done:
            path.append(name)
            for target in sorted(arrows[name]):
                visit(target)
            path.pop()
            done.add(name)

    for name in arrows:
        visit(name)


def test_no_host_is_imported():
    """One process for all: a statement that imports one is named."""
    code = '''
import sys
for statement in ('import kd_mm', 'import kd_mm.registry', 'import kd_mm.hooks, kd_mm.losses, kd_mm.distiller',
                  'from kd_mm import DistillHook, Distiller, build'):
    exec(statement)
    found = {'mmdet', 'mmseg'} & set(sys.modules)
    assert not found, (statement, found)
'''
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


def test_the_hall_imports_nothing_heavy():
    code = 'import kd_mm, sys; assert kd_mm.__version__ and not {"torch", "mmengine"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


@pytest.mark.parametrize('category', ['UserWarning', 'DeprecationWarning', 'RuntimeWarning'])
def test_a_warning_of_our_own_is_an_error_in_tests(category):
    code = f'import warnings\nwarnings.warn("odd", {category})'
    for name in ('kd_mm', 'kd_mm.losses.cwd'):
        with pytest.raises(Warning, match='odd'):
            exec(code, {'__name__': name})
    with warnings.catch_warnings(record=True):
        exec(code, {'__name__': 'kd_mm_of_somebody_else'})


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


def test_docstrings_of_public_classes():
    from mmengine.registry import HOOKS  # noqa: F401
    for name, cls in MODELS.module_dict.items():
        text = cls.__doc__ or ''
        assert len(text) > 80, name
        if issubclass(cls, KDLoss):
            for section in ('Args:', 'Returns:', 'Example:'):
                assert section in text, f'{name}: {section}'
