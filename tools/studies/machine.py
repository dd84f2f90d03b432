"""What a measurement is of: command, versions and machine, for the JSON files of the studies."""

import platform
import re
from pathlib import Path
from typing import Any, Dict

from sources import versions

#: What a result may depend on besides our own code and the hosts.
PACKAGES = ('torch', 'mmengine', 'mmcv', 'numpy', 'pycocotools')


def processor() -> str:
    """The model of the processor; not the name of the machine."""
    try:
        text = Path('/proc/cpuinfo').read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r'^model name\s*:\s*(.+)$', text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def installed() -> Dict[str, str]:
    """The versions that a result may depend on."""
    from kd_mm.hosts.table import packages  # heavy; not needed for --help

    return versions((*PACKAGES, *packages()))


def provenance(command: str, cores: int, threads: int) -> Dict[str, Any]:
    """What stands in a JSON file beside the numbers.

    Args:
        command: what was typed, without paths of the machine.
        cores: of the processor that could be used.
        threads: of one process.
    """
    return dict(command=command, python=platform.python_version(), versions=installed(),
                machine=dict(processor=processor(), cores=cores, threads=threads))
