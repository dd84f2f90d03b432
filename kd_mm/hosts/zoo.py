"""What the installed hosts ship: config files and the addresses of published weights."""

import difflib
import importlib.util
from pathlib import Path
from typing import List, Optional

import yaml

from kd_mm.hosts.renamed import hint
from kd_mm.hosts.table import hosts

#: Our own package: ``kd_mm::NAME`` is a config that we ship.
OWN = 'kd_mm'


def package_folder(package: str) -> Optional[Path]:
    """The folder that has the ``configs`` of an installed host (``mmdet``, ``mmseg``, ...) or of kd_mm, or None.

    By the host's entry where it says how; else by its package or scope.

    Found through the import system and not through the distribution's name, because the maintained forks have other
    distribution names than the package they install.
    """
    host = next((host for host in hosts() if package in (host.scope, host.package)), None)
    if host is not None and host.configs is not None:
        return host.configs()
    spec = importlib.util.find_spec(package if host is None else host.package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        # A host has them in .mim; a wheel of ours in the package itself, a checkout beside it.
        for root in (*([Path(place)] if package == OWN else []), Path(place) / '.mim', Path(place).parent):
            if (root / 'configs').is_dir():
                return root
    return None


def zoo_config(name: str) -> Path:
    """Path of an installed config named ``package::folder/file.py``; of kd_mm the name of the file is enough.

    Raises:
        FileNotFoundError: the host is not installed or has no such config; the nearest names are listed.
    """
    package, _, relative = name.partition('::')
    root = package_folder(package)
    if root is None:
        raise FileNotFoundError(f'{name}: {package} is not installed, or without its configs. Install it, or give the '
                                'path of a config file')
    path = root / 'configs' / (relative if relative.endswith('.py') else relative + '.py')
    if package == OWN and not path.is_file():
        ours = {found.name: found for found in sorted((root / 'configs').rglob('*.py'))}
        if path.name in ours and '/' not in relative:
            return ours[path.name]
        raise FileNotFoundError(f'{name}: kd_mm has no such config{hint(relative)}. Closest: '
                                f'{", ".join(_closest(path.name, sorted(ours)))}')
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob('*.py')) or \
            sorted(p.name for p in (root / 'configs').iterdir() if p.is_dir())
        raise FileNotFoundError(f'{name}: no such config in the installed {package}. Closest: '
                                f'{", ".join(_closest(path.name, near))}')
    return path


def _closest(name: str, names: List[str]) -> List[str]:
    inside = [other for other in names if name.removesuffix('.py') in other]
    return (inside or difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names)[:5]


def zoo_weights(config_path: str) -> Optional[str]:
    """URL of the published weights of an installed config, from the host's entry or model index; None if there are
    none."""
    path = Path(config_path).resolve()
    for host in hosts():
        root = package_folder(host.package) if host.weights is not None else None
        if host.weights is not None and root is not None and (root / 'configs').resolve() in path.parents:
            return host.weights(str(path))
    parts = path.parts
    if 'configs' not in parts:
        return None
    at = len(parts) - 1 - parts[::-1].index('configs')
    relative = '/'.join(parts[at:])
    for index in list(path.parent.glob('metafile.y*ml')):
        content = yaml.safe_load(index.read_text())
        models = content.get('Models', []) if isinstance(content, dict) else content
        for model in models or []:
            if model.get('Config') == relative and model.get('Weights'):
                return model['Weights']
    return None
