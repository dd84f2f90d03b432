"""Which versions of torch, mmengine, mmcv and the hosts kd_mm works with."""

import importlib
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import kd_mm
from kd_mm.hosts.table import hosts, packages

#: Package -> (least, below which it must stay), of what kd_mm needs besides the hosts, whose versions are in their
#: entries.  The major versions that are there today: the class names and signatures of the hosts are what we live by,
#: and a new major version may change them.
BASE: Dict[str, Tuple[str, Optional[str]]] = {
    'torch': ('2.1', None), 'mmengine': ('0.10', '1.0'), 'mmcv': ('2.0', '3.0')}


def ranges() -> Dict[str, Tuple[str, Optional[str]]]:
    """The same with every host of the table."""
    return {**BASE, **{host.package: host.versions for host in hosts() if host.versions is not None}}


def index_name(package: str) -> str:
    """Name on the package index.

    Example:
        >>> index_name('mmseg'), index_name('torch')
        ('mmsegmentation', 'torch')
    """
    return packages()[package].index if package in packages() else package


def numbers(version: str) -> Tuple[int, ...]:
    """The numbers of a version, for comparisons.

    Example:
        >>> numbers('2.13.0+cpu') > numbers('2.9'), numbers('0.10') <= numbers('0.10.7')
        (True, True)
    """
    return tuple(int(part) for part in re.findall(r'\d+', version.split('+')[0])[:3])


def mend(name: str, version: str) -> Optional[str]:
    """What is needed instead of a version and how to get it; None if it fits, or if nothing is known of the package.

    Example:
        >>> mend('mmseg', '0.30.0')
        'mmseg 1.0 or newer, below 2.0, is needed: pip install "mmsegmentation>=1.0,<2.0"'
        >>> mend('mmseg', '1.2.2') is None
        True
    """
    limits = ranges().get(name)
    if limits is None or not numbers(version):
        return None
    least, below = limits
    if numbers(least) <= numbers(version) and (below is None or numbers(version) < numbers(below)):
        return None
    limit = f', below {below},' if below else ''
    return (f'{name} {least} or newer{limit} is needed: pip install "{index_name(name)}>={least}'
            f'{f",<{below}" if below else ""}"')


def import_fault(name: str, load: Callable[[str], Any] = importlib.import_module) -> Optional[Tuple[str, str]]:
    """Why an installed package cannot be imported, and the mend; None where it can.

    Hosts assert the versions of what they build on while they are imported.

    Args:
        name: to import it by.
        load: imports it.

    Example:
        >>> import_fault('torch') is None
        True
    """
    try:
        load(name)
    except Exception as error:  # packages raise anything when they meet versions that they do not know
        text = str(error).split('\n')[0] or type(error).__name__
        mend = f'mend the import: python -c "import {name}"; or pip install {index_name(name)} --force-reinstall'
        if isinstance(error, AssertionError):
            mend = f'the versions do not fit each other: install the one that {name} names{_or_the_other(name)}'
        return f'{type(error).__name__}: {text}', mend
    return None


def _or_the_other(name: str) -> str:
    """Of a host whose package of its own name was given up for another one: that one, which takes later versions."""
    other = index_name(name)
    if other == name:
        return ''
    try:
        distribution(name)
    except PackageNotFoundError:
        return ''
    return f'; or take the package {other}, which is imported as {name}, too: pip uninstall {name}; pip install {other}'


def misfits(modules: Mapping[str, Any]) -> List[str]:
    """What does not fit of the packages that are imported, as sentences; nothing is imported here."""
    found = []
    for name in ranges():
        version = getattr(modules.get(name), '__version__', None)
        wanted = mend(name, version) if isinstance(version, str) else None
        if wanted is not None:
            found.append(f'{name} {version} is installed, and {wanted}')
    return found


def require() -> None:
    """Stop if an imported package has a version that kd_mm does not work with.

    Raises:
        ImportError: each package with the version found, the versions needed and the mend.
    """
    found = misfits(sys.modules)
    if found:
        raise ImportError(f'kd_mm {kd_mm.__version__} does not work with what is installed: {"; ".join(found)}. '
                          '`kd-mm doctor` looks at everything')
