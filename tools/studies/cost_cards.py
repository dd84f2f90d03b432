"""The tables of ``tools/studies/cost.py``: what was measured, as text in the methods' cards."""

import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

#: What was measured of one config, or why it was not.
Record = Dict[str, Any]

SHAPES = {'det': (800, 1333), 'seg': (512, 1024)}
#: Measured turns unless told otherwise; what differs from it stands in the card.
STEPS = 3
#: A method may add this much to the step beyond its share of the FLOPs.
LIMIT = 0.10
MARKS = re.compile(r'<!-- cost:[^\n]*-->\n.*?<!-- end of cost -->\n', re.DOTALL)
HEADER = ('| config | loss, ms | plain step, ms | teacher, ms | added | FLOP share | over | peak, MiB | own, MiB |\n'
          '|---|---|---|---|---|---|---|---|---|')


def plain_ms(plain: Record) -> float:
    return plain['forward_ms'] + plain['backward_ms'] + plain['optimizer_ms']


def shares(record: Record) -> Tuple[float, float, float]:
    """Milliseconds of the terms, their share of the step, and their share of the FLOPs."""
    loss = record['loss']
    spent = loss['forward_ms'] + loss['backward_ms'] + loss['opponent_ms']
    return (spent, spent / (plain_ms(record['plain']) + record['teacher']['ms']),
            loss['flops'] / max(record['plain']['flops'] + record['teacher']['flops'], 1))


def teacher_ms(teacher: Record) -> str:
    """As the host runs it, and after a slash in the form that training uses; records of before have the first alone."""
    fast = f' / {teacher["fast_ms"]:.0f}' if 'fast_ms' in teacher else ''
    return f'{teacher["ms"]:.0f}{fast}'


def describe(record: Record) -> str:
    spent, added, flops = shares(record)
    return f'{spent:.1f} ms, added {added:.1%}, FLOP share {flops:.1%}'


def cells(name: str, record: Record) -> List[str]:
    """One row of a card."""
    if 'error' in record:
        return [f'`{name}`', f'not measured: {record["error"].replace("|", "/")}', '', '', '', '', '', '', '']
    spent, added, flops = shares(record)
    loss = record['loss']
    peak = '-' if loss['peak_bytes'] is None else (
        f'{loss["peak_bytes"] / 2**20:.0f} ({loss["peak_bytes"] / loss["tapped_bytes"]:.1f}x)')
    return [f'`{name}`', f'{spent:.1f}', f'{plain_ms(record["plain"]):.0f}', teacher_ms(record["teacher"]),
            f'{added:.1%}', f'{flops:.1%}', f'{added - flops:+.1%}', peak, f'{loss["own_bytes"] / 2**20:.0f}']


def settings_line(task: str, record: Record) -> str:
    if 'error' in record:
        return ''
    device = record['device']
    if device == 'CPU':
        model = f' ({record["processor"]})' if 'processor' in record else ''
        device += f'{model}, {record["threads"]} thread{"s" if record["threads"] > 1 else ""}'
    memory = record['plain']['peak_bytes']
    peak = f' The plain step takes {memory / 2**20:.0f} MiB.' if memory else ''
    height, width = record['input_shape']
    padded = tuple(-(-edge // 32) * 32 for edge in SHAPES[task])
    shape = 'x'.join(map(str, (record['batch'], 3, height, width)))
    options = [] if (height, width) in (SHAPES[task], padded) else [f'--shape {height} {width}']
    if record['steps'] != STEPS:
        options.append(f'--steps {record["steps"]}')
    asked = f' (`{" ".join(options)}`)' if options else ''
    return f'Inputs {shape}{asked}, {device}, torch {record["torch"]}.{peak}'


def block(task: str, method: str, records: Dict[str, Record]) -> str:
    """The generated part of a card; ``records`` by file name."""
    lines = ['<!-- cost: written by `python tools/studies/cost.py`; do not edit -->',
             f'Measured by `python tools/studies/cost.py --task {task} --only {method}`, whose `--help` explains the '
             'columns.']
    parts: Dict[str, List[str]] = {}
    for name, record in sorted(records.items()):
        parts.setdefault(settings_line(task, record), []).append('| ' + ' | '.join(cells(name, record)) + ' |')
    for settings, rows in parts.items():
        lines += ['', *([settings, ''] if settings else []), HEADER, *rows]
    return '\n'.join([*lines, '<!-- end of cost -->']) + '\n'


def without_block(text: str) -> str:
    """A card as it was before it had a block: its section ``## Cost`` stays only if it says something of its own."""
    if not MARKS.search(text):
        return text
    sections = re.split(r'(?m)^(?=## )', text)
    for index, section in enumerate(sections):
        if MARKS.search(section):
            rest = MARKS.sub('', section).rstrip()
            sections[index] = '' if rest == '## Cost' else f'{rest}\n\n'
    return ''.join(sections).rstrip('\n') + '\n'


def placed(text: str, wanted: str) -> str:
    """A card with the block: in place of the old one, at the end of its section ``## Cost``, or in a new one."""
    if MARKS.search(text):
        return MARKS.sub(lambda _: wanted, text)
    sections = re.split(r'(?m)^(?=## )', text.rstrip('\n') + '\n')
    for index, section in enumerate(sections):
        if section.splitlines()[0] == '## Cost':
            sections[index] = f'{section.rstrip()}\n\n{wanted}\n'
            break
    else:
        traps = [index for index, section in enumerate(sections) if section.startswith('## Traps')]
        index = traps[0] if traps else len(sections)
        before = sections[index - 1].rstrip('\n')
        sections[index - 1] = before + '\n\n'
        sections.insert(index, f'## Cost\n\n{wanted}\n')
    return ''.join(sections).rstrip('\n') + '\n'


def rendered(task: str, home: Path, book: Any) -> Iterator[Tuple[Path, str]]:
    """Path and wanted text of every card: with the block where the method has a record, without one where not."""
    by_method: Dict[str, Dict[str, Record]] = {}
    for name, record in book.records.items():
        if (home / name).exists():
            method, _, file = name.rpartition('/')
            by_method.setdefault(method, {})[file] = record
    for card in sorted(home.glob('*/README.md')):
        text, records = card.read_text(), by_method.get(card.parent.name)
        yield card, placed(text, block(task, card.parent.name, records)) if records else without_block(text)


def render(task: str, home: Path, book: Any) -> None:
    """Write the cards that are not as they should be."""
    for card, wanted in rendered(task, home, book):
        if wanted != card.read_text():
            card.write_text(wanted)


def too_expensive(book: Any) -> List[Tuple[float, str]]:
    """(over, config) of everything beyond :data:`LIMIT`, the worst first."""
    found = []
    for name, record in book.records.items():
        if 'error' not in record:
            _, added, flops = shares(record)
            found.append((added - flops, name))
    return sorted((item for item in found if item[0] > LIMIT), reverse=True)


def summary(task: str, book: Any) -> int:
    """Print what is to be worked on; how many that are."""
    found = too_expensive(book)
    for _, name in found:
        print(f'{task}/{name}: {describe(book.records[name])}')
    failed = {name: record['error'] for name, record in sorted(book.records.items()) if 'error' in record}
    for name, why in failed.items():
        print(f'{task}/{name}: not measured: {why}')
    print(f'[cost] {len(book.records) - len(failed)} configs measured, {len(failed)} not; {len(found)} add more than '
          f'{LIMIT:.0%} to the step over their share of the FLOPs')
    return len(found)
