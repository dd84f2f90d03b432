#!/usr/bin/env python3
"""Write the numbers of README.md and docs/ from the JSON files of the repository.

    python tools/dev/write_numbers.py            writes what is not as it should be
    python tools/dev/write_numbers.py --check    only says so

What stands between ``<!-- numbers: NAME -->`` and ``<!-- end of numbers -->`` is written here.  The files name the
commands that the numbers are from: ``configs/demo/results.json`` and ``configs/real/results.json`` are written by
``tools/studies/demo.py --record``, ``configs/profile/results.json`` by hand of what ``tools/measure.py`` and
``tools/studies/auto_weight.py`` print.  The tables of ``configs/det`` and ``configs/seg`` have generators of their own,
``tools/studies/benchmark.py --render`` and ``tools/studies/cost.py``.
"""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools' / 'studies'))

from demo_numbers import FILES, roles_of  # noqa: E402

PAGES = ('README.md', 'docs/results.md', 'docs/configuration.md')
BLOCK = re.compile(r'<!-- numbers: (\w+) -->\n(.*?)<!-- end of numbers -->\n', re.DOTALL)
METRICS = {'coco/bbox_mAP': 'COCO mAP', 'mIoU': 'mIoU'}
TITLES = {
    'detection': 'GFL R18 (width 32 teaches 8), drawn shapes',
    'segmentation': 'PSPNet R18 (width 32 teaches 16), drawn streets',
    'bccd': 'GFL R18 (width 32 teaches 8), blood cells (BCCD)',
    'camvid': 'PSPNet R18 (width 32 teaches 16), CamVid',
}
HEAD = '| task | metric | teacher | plain student | distilled student | gain | gap closed |\n' + '|---' * 7 + '|\n'


def wrapped(text: str) -> str:
    """A paragraph or an item of a list in lines of the repository's length."""
    return textwrap.fill(text, 120, subsequent_indent='  ' if text.startswith('- ') else '', break_long_words=False,
                         break_on_hyphens=False) + '\n'


def read(name: str) -> Dict[str, Any]:
    """The tasks of ``demo``, or of real data."""
    return dict(json.loads(FILES[name].read_text()))


def profile() -> Dict[str, Any]:
    return dict(json.loads((ROOT / 'configs' / 'profile' / 'results.json').read_text()))


def gain(entry: Dict[str, Any]) -> float:
    roles = roles_of(entry)
    return float(entry.get('gain', roles['distilled'].mean - roles['student'].mean))


def closed(entry: Dict[str, Any]) -> Optional[float]:
    """Percent of the gap to the teacher; None where there was none, or nothing of it was closed."""
    roles = roles_of(entry)
    gap = roles['teacher'].mean - roles['student'].mean
    if gap <= 0 or gain(entry) <= 0:
        return None
    return float(entry.get('closed', 100 * gain(entry) / gap))


def deviations(entry: Dict[str, Any]) -> float:
    """The gain in standard deviations, the larger of both students' spreads."""
    roles = roles_of(entry)
    return gain(entry) / max(roles[name].spread or 0.0 for name in ('student', 'distilled'))


def best_of(entry: Dict[str, Any]) -> float:
    """The best plain student."""
    return float(entry['roles']['student'].get('best') or max(roles_of(entry)['student'].scores))


def weak(entry: Dict[str, Any]) -> bool:
    """Whether a plain student is better than the teacher."""
    return best_of(entry) > roles_of(entry)['teacher'].mean


def row(key: str, entry: Dict[str, Any]) -> str:
    roles, part = roles_of(entry), closed(entry)
    distilled = f'**{roles["distilled"]}**' if gain(entry) > 0 else str(roles['distilled'])
    cells = [TITLES[key], METRICS[entry['metric']], str(roles['teacher']), str(roles['student']), distilled,
             f'{gain(entry):+.1f}', 'none' if part is None else f'{part:.0f} %']
    return '| ' + ' | '.join(cells) + ' |\n'


def table(tasks: Dict[str, Any]) -> str:
    return HEAD + ''.join(row(key, tasks[key]) for key in TITLES if key in tasks)


def demo() -> str:
    """The table of the README, the single scores, as far as they were kept, and real data in a sentence."""
    tasks = read('demo')
    entry = tasks['detection']
    singles = '; '.join(
        f'{name} ' + ', '.join(f'{score:.1f}' for score in roles_of(entry)[role].scores)
        for name, role in (('plain', 'student'), ('distilled', 'distilled')))
    single = (f'Single detectors: {singles}: the gain is {deviations(entry):.1f} standard deviations of the larger '
              'spread.')
    return f'{table(tasks)}\n{wrapped(single)}\n{real_in_short()}'


def real_in_short() -> str:
    tasks = read('bccd')
    bccd, camvid = (gain(tasks[key]) for key in ('bccd', 'camvid'))
    second = 'none' if camvid <= 0 else f'one of {camvid:.1f} mIoU'
    if camvid <= 0 and weak(tasks['camvid']):
        second = f'with a teacher that was no better than its students, {second}'
    return wrapped(f'On real images a gain of {bccd:.1f} mAP (BCCD) and, {second} (CamVid): [all results]'
                   '(docs/results.md).')


def real() -> str:
    tasks = read('bccd')
    text = f'BCCD: {deviations(tasks["bccd"]):.1f} standard deviations of the larger spread.'
    if gain(tasks['camvid']) <= 0:
        text += ' **On CamVid distillation did not help**'
        text += (f': after 600 iterations the teacher is no better than its students (one plain student has '
                 f'{best_of(tasks["camvid"]):.1f}), so that there is little to learn from it.'
                 if weak(tasks['camvid']) else '.')
    return f'{table(tasks)}\n' + wrapped(text)


def step_cost() -> str:
    one, two = (profile()['step'][name] for name in ('retinanet', 'pspnet'))
    return ('A distilled step over a plain step plus the needed part of the teacher\'s forward, one CPU thread:\n'
            + '\n' + ''.join(wrapped(
                f'- {item["ratio"]:.2f} for `{item["made"]["command"]}` (half of the rounds {item["low"]:.2f} to '
                f'{item["high"]:.2f})') for item in (one, two)))


def auto_weight() -> str:
    one, two = (profile()['auto_weight'][name]['longer'] for name in ('retinanet', 'pspnet'))
    return wrapped(
        f'A step that measures took {one} % longer for the RetinaNet of `configs/profile` and {two} % for the PSPNet, '
        f'so {one / 50:.1f} % and {two / 50:.1f} % of a training at the default `every` (`python '
        'tools/studies/auto_weight.py CONFIG`, one CPU thread of a busy machine).')


WRITERS: Dict[str, Callable[[], str]] = {
    'demo': demo, 'real': real, 'step_cost': step_cost, 'auto_weight': auto_weight}


def rendered(text: str) -> str:
    """A page with every block as it should be.

    Raises:
        KeyError: a block that nothing here writes.
    """
    return BLOCK.sub(
        lambda found: f'<!-- numbers: {found[1]} -->\n{WRITERS[found[1]]()}<!-- end of numbers -->\n', text)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; exit code 1 if a page is not up to date')
    args = parser.parse_args(argv)
    old = []
    for name in PAGES:
        path = ROOT / name
        text = path.read_text(encoding='utf-8')
        if rendered(text) != text:
            old.append(name)
            if not args.check:
                path.write_text(rendered(text), encoding='utf-8')
    print('\n'.join(f'[numbers] {"not up to date" if args.check else "wrote"}: {name}' for name in old)
          or '[numbers] every page is up to date')
    return int(bool(old) and args.check)


if __name__ == '__main__':
    sys.exit(main())
