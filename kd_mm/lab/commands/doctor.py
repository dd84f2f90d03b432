"""``kd-mm doctor``: what is installed, what does not fit together, and the mend."""

import importlib
import importlib.util
import platform
import sys
from dataclasses import dataclass
from typing import Any, Callable, List, Optional

import click

import kd_mm
from kd_mm.hosts import versions
from kd_mm.hosts.table import packages


@dataclass
class Finding:
    """One line of the report.

    Attributes:
        name: of what was looked at.
        text: what was found.
        mend: what to do; None where all is well.
        needed: whether kd_mm cannot work like that.
    """

    name: str
    text: str
    mend: Optional[str] = None
    needed: bool = True


def _there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def look(name: str, load: Callable[[str], Any] = importlib.import_module) -> Finding:
    """A package: whether it is there, can be imported, and has a version that fits."""
    if not _there(name):
        return Finding(name, 'not installed', f'pip install {versions.index_name(name)}', needed=name not in packages())
    fault = versions.import_fault(name, load)
    if fault is not None:
        return Finding(name, f'cannot be imported: {fault[0]}', fault[1])
    version = str(getattr(load(name), '__version__', '?'))
    return Finding(name, version, versions.mend(name, version))


def operators() -> Finding:
    """Whether mmcv's compiled operators are there: NMS and RoIAlign need them."""
    if not _there('mmcv'):
        return Finding('mmcv ops', 'not there', 'install mmcv first')
    try:
        found = importlib.util.find_spec('mmcv._ext')
        if found is not None:
            importlib.import_module('mmcv._ext')
    except Exception as error:  # of mmcv itself, or of a library that the operators were linked to
        return Finding('mmcv ops', f'cannot be imported: {error}', 'compile mmcv for this torch: CONTRIBUTING.md, '
                       '"Installing a host"')
    if found is None:
        return Finding('mmcv ops', 'not compiled (mmcv-lite, or built without)', 'pip uninstall mmcv mmcv-lite; then '
                       'compile mmcv with MMCV_WITH_OPS=1: CONTRIBUTING.md, "Installing a host"')
    return Finding('mmcv ops', 'compiled')


def examine() -> List[Finding]:
    """Everything, in the order of what builds on what."""
    found = [Finding('kd_mm', kd_mm.__version__), Finding('python', platform.python_version())]
    if sys.version_info < (3, 10):
        found[-1] = Finding('python', platform.python_version(), 'kd_mm needs Python 3.10 or newer')
    found += [look(name) for name in ('numpy', 'torch', 'mmengine', 'mmcv')]
    if found[3].mend is None:
        torch = importlib.import_module('torch')
        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found.append(Finding('devices', ', '.join(devices) or 'no CUDA device: everything runs on the CPU'))
    found.append(operators())
    # Of the hosts that build on another one, those that are there.
    names = [name for name, host in packages().items() if host.parent is None or _there(name)]
    rows = [look(name) for name in names]
    if not any(map(_there, names)):
        rows = [Finding(row.name, row.text, row.mend) for row in rows]  # one of them is needed
    found += rows
    for name in filter(_there, names):
        found += [Finding(need, f'not installed, and {name} imports it', f'pip install {need}')
                  for need in packages()[name].needs if not _there(need)]
    return found


@click.command('doctor')
def command() -> None:
    """Versions of everything that works together here, what does not fit, and the mend.

    The exit status is 1 if something keeps kd_mm from working.
    """
    found = examine()
    for item in found:
        mark = 'ok' if item.mend is None else 'WRONG' if item.needed else 'note'
        click.echo(f'{mark:<6} {item.name:<10} {item.text}')
        if item.mend is not None:
            click.echo(f'{"":<17} -> {item.mend}')
    wrong = [item.name for item in found if item.mend is not None and item.needed]
    click.echo(f'\n{len(wrong)} to mend: {", ".join(wrong)}' if wrong else '\nall fits')
    sys.exit(1 if wrong else 0)
