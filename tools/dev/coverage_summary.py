#!/usr/bin/env python3
"""Print how many lines of a package the tests have run: the total, and each file below 90 % with the lines it misses.

    python -m pytest --cov=kd_mm --cov-report=; python tools/dev/coverage_summary.py

`make test` does both.  Lines that only subprocesses run (ranks of DDP, tools as commands) count as missed.
"""

import argparse
import sys
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence

import coverage

ROOT = Path(__file__).resolve().parents[2]
#: What the whole is meant to reach, and what every file should.
AIM, LOW = 95.0, 90.0


class Row(NamedTuple):
    """One file: how many lines could run, how many did not, and which."""
    name: str
    lines: int
    missed: int
    where: str

    @property
    def percent(self) -> float:
        return 100.0 * (self.lines - self.missed) / self.lines if self.lines else 100.0


def read(data: Path, package: Path) -> List[Row]:
    """The rows of all files of a package, those too that nothing has imported.

    Raises:
        FileNotFoundError: there is no data file.
    """
    if not data.is_file():
        raise FileNotFoundError(f'no {data}: run the tests with --cov first')
    # The settings file of a project may leave lines out; what counts here is every line.
    measured = coverage.Coverage(data_file=str(data), config_file=False)
    measured.load()
    rows = []
    for path in sorted(package.rglob('*.py')):
        _, lines, _, missed, where = measured.analysis2(str(path))
        rows.append(Row(path.relative_to(package.parent).as_posix(), len(lines), len(missed), where))
    return rows


def summary(rows: Sequence[Row]) -> str:
    lines, missed = sum(row.lines for row in rows), sum(row.missed for row in rows)
    total = Row('', lines, missed, '').percent
    low = sorted((row for row in rows if row.percent < LOW), key=lambda row: row.percent)
    return '\n'.join([
        f'coverage: {total:.1f} % of {lines} lines in {len(rows)} files (aim: {AIM:.0f} %); '
        + (f'{len(low)} below {LOW:.0f} %:' if low else f'none below {LOW:.0f} %'),
        *(f'  {row.percent:5.1f} %  {row.name}: {row.where}' for row in low)])


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=ROOT / '.coverage', help='data file. Default: .coverage')
    parser.add_argument('--package', type=Path, default=ROOT / 'kd_mm', help='folder to report. Default: kd_mm')
    args = parser.parse_args(argv)
    try:
        print(summary(read(args.data, args.package.resolve())))
    except FileNotFoundError as error:
        print(f'coverage_summary.py: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
