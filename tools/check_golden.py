"""Compare the losses of kd_mm with golden vectors: numbers that the authors' own code gave for small inputs.

    python tools/check_golden.py tests/golden             every vector below a folder
    python tools/check_golden.py tests/golden --only fgd  one of them, by the stem of its file name

The file name says which method; everything else (hyper-parameters, shapes, parameters, masks) comes from the file.
Every expected number of a file must be compared, or skipped by name with a reason: one that is neither is an error.
So is a hyper-parameter or an input that the recipe does not read, and one that contradicts the shapes.
A line a file, with the largest relative error of the losses, of the terms and of the gradients.

Exit status: 0 all agree, 1 a number is off or a file cannot be read, 2 a file has no implementation (and none is off).

To add a method, write ``tests/recipes/<method>.py`` with a function that takes a :class:`recipes.vector.Vector` and
decorate it with ``@recipe('name of the file')`` (shell wildcards are allowed, the longest pattern wins).  It calls
``Vector.run`` once for each behaviour that the file has numbers of, reads every hyper-parameter (``number``, ``words``
for a text), and says which it has no choice of (``only``), which the arrays repeat (``agree``) and which change nothing
(``ignore``).
"""

import argparse
import sys
from pathlib import Path
from typing import List, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tests'))

from recipes.vector import Report, Vector, find_recipe  # noqa: E402


def check_file(path: Path) -> Report:
    """Run one golden file."""
    function = find_recipe(path.stem)
    if function is None:
        return Report(path.stem, 'no implementation')
    try:
        vector = Vector(path)
        function(vector)
    except Exception as error:  # whatever is wrong with one file must not hide the others
        return Report(path.stem, 'off', problems=[f'{type(error).__name__}: {error}'])
    report = vector.report
    if vector.unseen or not report.compared:
        report.status = 'off'
        report.problems.append(f'not compared: {", ".join(sorted(vector.unseen)) or "anything"}')
    if vector.unread:
        report.status = 'off'
        report.problems.append(f'the recipe reads less than the file says: {", ".join(sorted(vector.unread))}')
    return report


def check_folder(folder: Path, only: Optional[str] = None) -> List[Report]:
    """Run every ``*.npz`` below a folder, or the ones whose stem is ``only``.

    Raises:
        FileNotFoundError: there is no such folder or no such file.
    """
    paths = sorted(path for path in Path(folder).rglob('*.npz') if only in (None, path.stem))
    if not paths:
        raise FileNotFoundError(f'no {only or "*"}.npz below {folder}')
    return [check_file(path) for path in paths]


def exit_status(reports: Sequence[Report]) -> int:
    states = {report.status for report in reports}
    return 1 if 'off' in states else 2 if 'no implementation' in states else 0


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='folder with *.npz, searched with its sub-folders')
    parser.add_argument('--only', metavar='NAME', help='stem of one file')
    args = parser.parse_args(arguments)
    try:
        reports = check_folder(args.folder, args.only)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    print(f'{"file":34} {"loss":>9} {"terms":>9} {"gradients":>9}  numbers')
    for report in reports:
        shown = [f'{report.errors[kind]:9.1e}' if kind in report.errors else f'{"-":>9}'
                 for kind in ('loss', 'terms', 'gradients')]
        print(f'{report.name:34} {" ".join(shown)}  {report.compared:4}  {report.status}')
        for problem in report.problems:
            print(f'    {problem}')
        for name, reason in report.skipped.items():
            print(f'    skipped {name}: {reason}')
    return exit_status(reports)


if __name__ == '__main__':
    sys.exit(main())
