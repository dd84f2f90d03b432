#!/usr/bin/env python3
"""Write the numbers of README.md and docs/ from the JSON files of the repository.

    python tools/dev/write_numbers.py            writes what is not as it should be
    python tools/dev/write_numbers.py --check    only says so

What stands between ``<!-- numbers: NAME -->`` and ``<!-- end of numbers -->`` is written here.  The files name the
commands that the numbers are from: ``configs/demo/results.json`` and ``configs/real/results.json`` are written by
``tools/studies/demo.py --record``, ``configs/profile/results.json`` by hand of what ``tools/measure.py`` and
``tools/studies/auto_weight.py`` print, its ``speed.json`` by ``tools/studies/teacher_speed.py --json`` and its
``mmrazor.json`` by ``tools/studies/against_mmrazor.py --json``, its ``scaling.json`` by ``tools/studies/scaling.py
--record``; rows on pretrained backbones are from
``configs/<task>/benchmark.json``.  The tables of ``configs/det`` and ``configs/seg`` have generators of their own,
``tools/studies/benchmark.py --render`` and ``tools/studies/cost.py``.
"""

import argparse
import json
import re
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools' / 'studies'))

from benchmark_plan import RECIPE, read_settings  # noqa: E402
from benchmark_results import Book, Results  # noqa: E402
from benchmark_table import METRICS, gain_text, mean_text  # noqa: E402
from demo_numbers import FILES, roles_of  # noqa: E402
from scaling import table as scaling_table  # noqa: E402

PAGES = ('README.md', 'docs/results.md', 'docs/configuration.md', 'docs/cost.md', 'docs/several_gpus.md')
PROFILE = ROOT / 'configs' / 'profile'
BLOCK = re.compile(r'<!-- numbers: (\w+) -->\n(.*?)<!-- end of numbers -->\n', re.DOTALL)
#: Pairs on pretrained backbones, by task.
PRETRAINED = {'det': ('lite_gfl', 'lite_rcnn', 'lite_dino'), 'seg': ('lite_psp', 'segformer')}
#: Seeds that a row of the README needs.
SEEDS = 3
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
    return dict(json.loads((PROFILE / 'results.json').read_text()))


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
    metric = METRICS.get(entry['metric'], entry['metric'])
    cells = [TITLES[key], metric, str(roles['teacher']), str(roles['student']), distilled,
             f'{gain(entry):+.1f}', 'none' if part is None else f'{part:.0f} %']
    return '| ' + ' | '.join(cells) + ' |\n'


def table(tasks: Dict[str, Any]) -> str:
    return HEAD + ''.join(row(key, tasks[key]) for key in TITLES if key in tasks)


def demo() -> str:
    return table(read('demo'))


def demo_singles() -> str:
    """Single scores of the demo, as far as they were kept."""
    entry = read('demo')['detection']
    singles = '; '.join(
        f'{name} ' + ', '.join(f'{score:.1f}' for score in roles_of(entry)[role].scores)
        for name, role in (('plain', 'student'), ('distilled', 'distilled')))
    return wrapped(f'Single detectors: {singles}: the gain is {deviations(entry):.1f} standard deviations of the '
                   'larger spread.')


def recipe_row(results: Results) -> str:
    """The row of what the recipe takes: its own, or that of the method which it takes where that has more seeds and was
    the same training, to the digits of the log, in every seed that both have."""
    method, runs = results.data.get('recipe'), results.data['runs']
    own, other = runs.get(RECIPE, {}), runs.get(method, {})
    same = [all(own[seed].get(key) == other[seed].get(key) for key in ('score', 'kd_task_ratio'))
            for seed in own.keys() & other.keys()]
    return str(method) if same and all(same) and len(other) > len(own) else RECIPE


def pretrained(configs: Path = ROOT / 'configs') -> str:
    """What ``kd-mm distill --recipe auto`` takes, on the pairs with pretrained backbones, beside the plain student of
    the same seeds; a pair counts from :data:`SEEDS` seeds on.

    Args:
        configs: folder with the benchmark's results, <task>/benchmark.json.
    """
    rows = ''
    for task, pairs in PRETRAINED.items():
        book = Book(configs / task / 'benchmark.json')
        for pair in pairs:
            settings, results = read_settings(pair), Results(book, pair)
            row = recipe_row(results)
            found = results.gain(row)
            if found is None or found[2] < SEEDS:
                continue
            plain, ours = (dict(results.group(name).scores) for name in ('plain', row))
            seeds = [seed for seed in plain if seed in ours]
            text, verdict = mean_text([ours[seed] for seed in seeds]), results.verdict(row)
            rows += '| ' + ' | '.join([
                settings.title, METRICS.get(settings.metric, settings.metric), mean_text(results.scores('teacher')),
                mean_text([plain[seed] for seed in seeds]),
                f'**{text}**' if verdict == 'better' else text, f'`{results.data.get("recipe")}`',
                gain_text(*found[:2]), str(len(seeds)), verdict]) + ' |\n'
    return ('| pair | metric | teacher | plain student | `--recipe auto` | which is | gain, 95 % interval '
            '| seeds | shown |\n' + '|---' * 9 + f'|\n{rows}')


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


CLOCKS = dict(cpu='time of the processor', wall='time that passes')
#: What teacher_speed.py measures, as a table names it.
SPEED_PAIRS = {
    'retinanet-r50': 'RetinaNet R50 from R101', 'retinanet-r18': 'RetinaNet R18 from R101',
    'rtmdet-s': 'RTMDet-s from -m', 'faster-rcnn-r50': 'Faster R-CNN R50 from R101',
    'pspnet-r18': 'PSPNet R18 from R101', 'segformer-b0': 'SegFormer B0 from B4',
    'deformable-detr-r50': 'Deformable DETR R50 from R50 with refinement, two stages',
    'deformable-detr-detrdistill': 'Deformable DETR R50 from R50 with refinement, DETRDistill'}


#: Ratios of a table, and their heads; what no pair of a machine has is left out.
SPEED_COLUMNS = {
    'auto': '`auto` / host', 'peak': 'arithmetic / host', 'step': 'KD step / (plain + host)',
    'implied': 'from the teacher alone', 'bf16': 'bf16 / host', 'step, bf16': 'KD step, bf16',
    'implied, bf16': 'from the teacher alone'}


def teacher_speed() -> str:
    """Forms of the teacher, largest images first; a table for each machine and way to measure."""
    tables: Dict[str, Any] = {}
    for found in json.loads((PROFILE / 'speed.json').read_text()):
        conditions = (f'{found["made"]["machine"]["processor"]}, {found["threads"]} thread(s), torch {found["torch"]}, '
                      f'{CLOCKS[found["clock"]]}:')
        tables.setdefault(conditions, []).append(found)
    parts = []
    for conditions, rows in tables.items():
        rows.sort(key=lambda found: (list(SPEED_PAIRS).index(found['pair']), -found['shape'][0]))
        columns = [name for name in SPEED_COLUMNS if any(name in found['ratios'] for found in rows)]
        lines = [['pair', 'images', 'host, s', *(SPEED_COLUMNS[name] for name in columns)]]
        for found in rows:
            ratios = [found['ratios'].get(name) for name in columns]
            lines.append([
                SPEED_PAIRS[found['pair']], '{} x {} x {}'.format(found['batch'], *found['shape']),
                f'{found["ms"]["host"]["median"] / 1000:.2f}',
                *('{median:.2f} ({low:.2f} to {high:.2f})'.format(**ratio) if ratio else '' for ratio in ratios)])
        head, *body = (f'| {" | ".join(line)} |\n' for line in lines)
        parts.append(f'{wrapped(conditions)}\n{head}' + '|---' * len(lines[0]) + '|\n' + ''.join(body))
    return '\n'.join(parts)


def against_mmrazor() -> str:
    """Time and memory of a step, a table for each size of the images."""
    text = ''
    for found in json.loads((PROFILE / 'mmrazor.json').read_text()):
        base = found['ms']['MMRazor fpn']
        head = '{} images of {} x {}, '.format(found['batch'], *found['shape']) + (
            f'{found["threads"]} thread(s), {found["made"]["machine"]["processor"]}:')
        text += ('\n' if text else '') + wrapped(head)
        text += '\n| step | s | of MMRazor\'s | peak, MiB |\n' + '|---' * 4 + '|\n'
        for name, times in found['ms'].items():
            ratios = statistics.quantiles([own / other for own, other in zip(times, base)], n=4)
            text += (f'| {name} | {statistics.median(times) / 1000:.2f} | {ratios[1]:.2f} ({ratios[0]:.2f} to '
                     f'{ratios[2]:.2f}) | {found["peak_bytes"][name] / 2**20:.0f} |\n')
    return text


def scaling() -> str:
    """Expected steps on many GPUs."""
    found = json.loads((PROFILE / 'scaling.json').read_text())
    lines = scaling_table(found['results'], argparse.Namespace(**found['options'])).splitlines()
    return ''.join(f'{line}\n' if line.startswith('|') or not line else wrapped(line) for line in lines)


WRITERS: Dict[str, Callable[[], str]] = {
    'demo': demo, 'demo_singles': demo_singles, 'pretrained': pretrained, 'real': real, 'step_cost': step_cost,
    'auto_weight': auto_weight, 'teacher_speed': teacher_speed, 'against_mmrazor': against_mmrazor, 'scaling': scaling}


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
