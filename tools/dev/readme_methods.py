#!/usr/bin/env python3
"""Write the README's table of methods from the registered losses; ``--check`` only compares."""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kd_mm.losses.base.loss import KDLoss  # noqa: E402
from kd_mm.registry import MODELS, choices  # noqa: E402

MARKS = re.compile(r'(<!-- methods:[^\n]*-->\n)(.*?)(<!-- end of methods -->)', re.DOTALL)


def table() -> str:
    rows = ['| loss | method | file | configs |', '|---|---|---|---|']
    for name in choices(KDLoss):
        cls = MODELS.module_dict[name]
        method = cls.__module__.rsplit('.', 1)[1]
        title = ' '.join((cls.__doc__ or '').strip().split('\n\n')[0].split()).rstrip('.')
        folders = sorted(folder.relative_to(ROOT).as_posix() for folder in ROOT.glob(f'configs/*/{method}'))
        links = ', '.join(f'[{folder}]({folder}/README.md)' for folder in folders)
        rows.append(f'| `{name}` | {title} | `kd_mm/losses/{method}.py` | {links} |')
    return '\n'.join(rows) + '\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='exit with 1 if the README is out of date')
    args = parser.parse_args()
    readme = ROOT / 'README.md'
    text = readme.read_text()
    wanted = MARKS.sub(lambda found: found.group(1) + table() + found.group(3), text)
    if args.check:
        return int(wanted != text)
    readme.write_text(wanted)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
