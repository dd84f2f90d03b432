"""The code that a result depends on: what a class's module imports within kd_mm, in turn and all of it.

A hash of code is one of its syntax tree without docstrings, so that neither a comment nor a sentence makes a result
old.
"""

import ast
import functools
import hashlib
import inspect
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Sequence, Set

ROOT = Path(__file__).resolve().parents[2]
#: Rooms of kd_mm that every distilled training goes through, whatever its losses.
ENGINE = ('engine', 'hosts', 'teachers', 'types')


def types_in(value: Any) -> Iterator[str]:
    """Every ``type='...'`` of nested dicts and lists."""
    if hasattr(value, 'items'):
        if isinstance(value.get('type'), str):
            yield value['type']
        for part in value.values():
            yield from types_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from types_in(part)


def loss_sources(losses: Mapping[Any, Mapping[str, Any]]) -> List[str]:
    """The text of the files that the classes of some losses, regions or adapters are in, of nothing below them."""
    from kd_mm.registry import MODELS

    files = {inspect.getfile(MODELS.get(loss['type'])) for loss in losses.values()}
    return [Path(path).read_text() for path in sorted(files)]


def module_file(name: str, root: Path = ROOT) -> Iterable[Path]:
    """The file of a module of kd_mm, or of the one that a dotted name lies in; none for the package itself."""
    parts = name.split('.')
    for count in range(len(parts), 1, -1):
        path = root.joinpath(*parts[:count])
        for file in (path.with_suffix('.py'), path / '__init__.py'):
            if file.is_file():
                return [file]
    return []


@functools.lru_cache(maxsize=None)
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path, root: Path = ROOT) -> Set[Path]:
    """Files of kd_mm that a file imports."""
    names: List[str] = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'kd_mm':
            names += [f'{node.module}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.startswith('kd_mm.')]
    return {file for name in names for file in module_file(name, root)}


def closure(files: Iterable[Path], root: Path = ROOT) -> List[Path]:
    """These files and all that they import within kd_mm, in turn."""
    found: Set[Path] = set()
    waiting = list(files)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += imported(path, root) - found
    return sorted(found)


def code_hash(files: Iterable[Path], root: Path = ROOT) -> str:
    """Hash of the code of some files, whatever their comments and docstrings say."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f'{path.relative_to(root).as_posix()}\n{_bare(path)}\n'.encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=None)
def _bare(path: Path) -> str:
    """The syntax tree of a file without its docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(
                    first.value.value, str):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def losses_hash(losses: Mapping[str, Mapping[str, Any]]) -> str:
    """Hash of the code of the losses of a method: their classes, regions, adapters and schedules, with all below."""
    from kd_mm.registry import MODELS

    found = [MODELS.get(name) for name in dict.fromkeys(types_in(losses))]
    files = [Path(inspect.getfile(cls)) for cls in found if cls is not None]
    # The adapter that a term without one gets. What is outside of kd_mm, such as mmengine, is told by its version.
    files.append(ROOT / 'kd_mm' / 'adapters' / 'auto.py')
    return code_hash(closure(file for file in files if ROOT / 'kd_mm' in file.parents))


def engine_hash() -> str:
    """Hash of the code that every distilled training goes through."""
    files = [path for room in ENGINE for path in (ROOT / 'kd_mm' / room).rglob('*.py')]
    return code_hash(closure(files))


def imports_hash(config: Mapping[str, Any]) -> str:
    """Hash of the code of this repository that a config imports, such as a backbone of the benchmark."""
    names: Sequence[str] = (config.get('custom_imports') or {}).get('imports', ())
    files = [ROOT.joinpath(*name.split('.')).with_suffix('.py') for name in names]
    return code_hash(sorted(path for path in files if path.is_file()))


def versions(names: Iterable[str]) -> Dict[str, str]:
    """Distribution and version of some installed packages, which are named as they are imported."""
    from importlib.metadata import packages_distributions, version

    known = packages_distributions()
    found = [known[name][0] for name in names if name in known]
    return {name: version(name).split('+')[0] for name in found}
