"""The page of a report: which figures and tables, in which order."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

from kd_mm.hosts.table import DETECTION
from kd_mm.lab.report import plots
from kd_mm.lab.report.advice import lost
from kd_mm.lab.report.agreement import mean_at
from kd_mm.lab.report.examples import LEGEND, LOST, REST, WON, WRONG, Example
from kd_mm.lab.report.numbers import of_all
from kd_mm.lab.report.page import difference, percent, render, signed
from kd_mm.lab.report.pictures import hexadecimal
from kd_mm.lab.report.sources import ROLES

#: Rows of a table of classes that are shown at once; the others are folded away.
ROWS = 20


@dataclass
class Table:
    """A table.

    Attributes:
        folded: what is said where it has to be opened.
        kind: CSS class.
        beside: whether it is narrow enough to stand beside a figure.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    folded: str = ''
    kind: str = ''
    beside: bool = False

    def values(self) -> Dict[str, Any]:
        return {'head': self.head, 'rows': self.rows, 'folded': self.folded, 'class': self.kind, 'beside': self.beside}


@dataclass
class Section:
    """A part of the page."""

    title: str
    text: str = ''
    plots: List[str] = field(default_factory=list)
    tables: List[Dict[str, Any]] = field(default_factory=list)


def html(report: Dict[str, Any], examples: Sequence[Example], palette: Sequence[Tuple[int, int, int]]) -> str:
    """The whole page, without a file beside it.

    Args:
        report: of :func:`kd_mm.lab.report.numbers.numbers`.
        examples: of :func:`kd_mm.lab.report.examples.examples`.
        palette: (r, g, b) of each class.
    """
    models = report['models']
    score = {role: models[role]['score'] for role in models}
    gap = difference(score.get('teacher'), score['student'])
    gain = difference(score['student'], score.get('plain')) if 'plain' in score else None
    whole = difference(score.get('teacher'), score.get('plain'))
    sections = _of_detection(report) if report['task'] == DETECTION else _of_segmentation(report)
    agreement = _agreement(report)
    detection = report['task'] == DETECTION
    legend = LEGEND if detection else [
        ('only the teacher is right', hexadecimal(LOST)), ('only the student is right', hexadecimal(WON)),
        ('no difference', hexadecimal(REST)),
        *((name, hexadecimal(colour)) for name, colour in zip(report['classes'], palette))]
    return render(
        'report.html', report=report, names=ROLES, colours=plots.COLOURS, gap=gap, gain=gain,
        closed=gain / whole if gain is not None and whole and whole > 0 else None,
        sections=[section for section in [*sections, agreement] if section.plots or section.tables], examples=examples,
        legend=legend, inventory=[(ROLES[role], models[role]['config'], models[role]['weights']) for role in models])


def _roles(report: Dict[str, Any]) -> List[str]:
    return [role for role in ROLES if role in report['models']]


def _coloured(value: Optional[float], sign: int = 1) -> Any:
    """A difference with its sign, in the colour of what is good."""
    if value is None or abs(value) < 5e-4:
        return percent(value if value is None else 0.0)
    return dict(text=signed(value), kind='good' if value * sign > 0 else 'bad', style='')


def _by(report: Dict[str, Any], get: Any) -> Dict[str, Any]:
    return {role: get(report['models'][role]) for role in _roles(report)}


def _measures(report: Dict[str, Any], rows: Sequence[Tuple[str, Any]]) -> Dict[str, Any]:
    """A table of measures by model, with the student's difference to the teacher."""
    roles = _roles(report)
    lines = []
    for name, get in rows:
        values = _by(report, get)
        lines.append([name, *_with_gap([percent(values[role]) for role in roles], _coloured(
            difference(values['student'], values.get('teacher'))), roles)])
    return Table(['', *_with_gap([ROLES[role] for role in roles], 'gap', roles)], lines, beside=True).values()


def _with_gap(cells: List[Any], gap: Any, roles: Sequence[str]) -> List[Any]:
    """A row's cells of all models; the gap to the teacher stands behind the student, where a phone shows it."""
    at = list(roles).index('student') + 1
    return [*cells[:at], gap, *cells[at:]] if 'teacher' in roles else cells


def _classes(report: Dict[str, Any], many: str, columns: Sequence[Tuple[str, str]]) -> List[Dict[str, Any]]:
    """Tables of the classes, the largest gap to the teacher first; what is long is folded."""
    roles = _roles(report)
    teacher = 'teacher' in roles
    key = columns[0][1]
    cases = (report.get('compared') or {}).get('classes')
    head = ['class', *_with_gap([f'{ROLES[role]} {columns[0][0]}' for role in roles], 'gap', roles), many,
            *(f'student {name}' for name, _ in columns[1:])] + (['teacher right, student wrong'] if teacher else [])
    found = []
    for index, entry in enumerate(report['models']['student']['classes']):
        rows = {role: report['models'][role]['classes'][index] for role in roles}
        if not entry[many] and all(rows[role][key] is None for role in roles):
            continue  # the data have none, and nobody has found one
        gap = difference(rows['student'][key], rows['teacher'][key]) if teacher else None
        scores = _with_gap([percent(rows[role][key]) for role in roles], _coloured(gap), roles)
        line: List[Any] = [entry['name'], *scores, f'{entry[many]:,}'.replace(',', ' '),
                           *(percent(entry[column]) for _, column in columns[1:])]
        if teacher:
            share = lost(cases[index]) if cases else None
            line.append(f'{percent(share, 0)} %' if share is not None else percent(None))
        found.append((gap if gap is not None else entry[key] if entry[key] is not None and not teacher else 9.0, line))
    lines = [line for _, line in sorted(found, key=lambda pair: pair[0])]
    tables = [Table(head, lines[:ROWS]).values()] if lines else []
    if lines[ROWS:]:
        tables.append(Table(head, lines[ROWS:], f'the other {len(lines) - ROWS} classes').values())
    return tables


def _calibration(report: Dict[str, Any], what: str) -> Section:
    found = {role: entry for role, entry in _by(report, lambda model: model.get('calibration')).items()
             if entry and entry['ece'] is not None}
    section = Section('Calibration', 'Of the answers with a score of 0.8, 80 of 100 should be right. Below the dotted '
                      f'line the scores are too high. {what}')
    if found:
        section.plots = [plots.reliability('Right, by score', found, ROLES)]
        section.tables = [Table(['', *(ROLES[role] for role in found)], [
            ['calibration error', *(percent(entry['ece']) for entry in found.values())],
            ['mean score less share right', *(signed(entry['gap']) for entry in found.values())]],
            beside=True).values()]
    return section


def _lost_bars(title: str, tables: Dict[str, Dict[str, int]], what: str) -> str:
    """Of what the teacher has right, the share that the student has wrong."""
    names = [f'{name} ({table["both"] + table["teacher"]})' for name, table in tables.items()]
    return plots.bars(title, names, {'student wrong': [
        None if (share := lost(table)) is None else 100 * share for table in tables.values()]}, what,
        {'student wrong': WRONG})


# ---------------------------------------------------------------------------------------------------------------------
# detection


def _of_detection(report: Dict[str, Any]) -> List[Section]:
    roles, compared = _roles(report), report.get('compared')
    names = {role: ROLES[role] for role in roles}
    scores = Section('Scores', tables=[_measures(report, [
        ('mAP', lambda model: model['ap']), ('AP at 0.5', lambda model: model['ap50']),
        ('AP at 0.75', lambda model: model['ap75']), ('recall (100 a picture)', lambda model: model['recall']),
        *((f'mAP, {size}', lambda model, size=size: model['sizes'][size]) for size in ('small', 'medium', 'large')),
        ('best F1', lambda model: model['working']['f1']),
        ('precision there', lambda model: model['working']['precision']),
        ('recall there', lambda model: model['working']['recall'])])])
    steps = [0.05 * index for index in range(21)]
    scores.plots = [plots.lines('Precision over recall, at an overlap of 0.5', [
        (names[role], plots.COLOURS[role], list(zip(steps, report['models'][role]['curve'] or []))) for role in roles],
        'recall', 'precision', 0.0, 1.0)]
    if compared:
        scores.plots.append(_lost_bars('Objects that the teacher finds and the student misses', compared['sizes'],
                                       '% of those that the teacher finds (their number)'))
        total = of_all(compared['classes'])
        shared = compared['shared']['student']
        also = '' if shared is None else f"The student shares {percent(shared, 0)} % of the teacher's detections."
        scores.text = (
            f'Of {sum(total.values())} objects both find {total["both"]}, the teacher alone {total["teacher"]}, the '
            f'student alone {total["student"]}, neither {total["neither"]}; each at the score at which its F1 is best. '
            + also)
    kinds = list(report['models']['student']['errors']['cost'])
    errors = Section(
        'Types of errors', 'The cost of a type is the AP at 0.5 that would be gained if an oracle mended it alone '
        '(TIDE). They do not add up: an error may hide another one. The table has their number at the score of the '
        'best F1.')
    errors.plots = [plots.bars('Cost of each type', kinds, {
        names[role]: [100 * report['models'][role]['errors']['cost'][kind] for kind in kinds] for role in roles},
        'points of AP at 0.5', {names[role]: plots.COLOURS[role] for role in roles})]
    errors.tables = [Table(['number of errors', *(names[role] for role in roles)], [
        [kind, *(str(report['models'][role]['errors']['counts'][kind]) for role in roles)] for kind in kinds],
                           beside=True).values()]
    classes = Section('Classes', tables=_classes(report, 'objects', [('mAP', 'ap'), ('AP at 0.5', 'ap50')]))
    few = [entry for entry in report['models']['student']['classes'] if entry['curve']]
    if 1 < len(few) <= 8:
        classes.plots = [plots.lines("The student's precision over recall", [
            (entry['name'], plots.OTHERS[index], list(zip(steps, entry['curve']))) for index, entry in enumerate(few)],
            'recall', 'precision', 0.0, 1.0)]
    return [scores, errors, classes, _calibration(
        report, 'Right is a box of the right class with an overlap of 0.5 that no better box has taken; scores from '
        '0.05 on count.')]


# ---------------------------------------------------------------------------------------------------------------------
# segmentation


def _of_segmentation(report: Dict[str, Any]) -> List[Section]:
    roles, compared = _roles(report), report.get('compared')
    scores = Section('Scores', tables=[_measures(report, [
        ('mIoU', lambda model: model['miou']), ('pixels right', lambda model: model['accuracy']),
        ('mean accuracy of the classes', lambda model: model['mean_accuracy']),
        ('boundary IoU', lambda model: model['boundary_iou']),
        *((f'pixels right in {size} segments', lambda model, size=size: model['sizes'][size])
          for size in ('small', 'medium', 'large'))])])
    if compared:
        total = of_all(compared['classes'])
        whole = max(sum(total.values()), 1)
        scores.text = (
            f'Both are right in {percent(total["both"] / whole)} % of the pixels, the teacher alone in '
            f'{percent(total["teacher"] / whole)} %, the student alone in {percent(total["student"] / whole)} %, '
            f'neither in {percent(total["neither"] / whole)} %. They say the same in '
            f'{percent(compared["shared"]["student"])} %.')
    rows = {role: report['models'][role]['distance'] for role in roles}
    spans = [f'{row["low"]} to {row["high"]}' if row['high'] else f'{row["low"]} and more' for row in rows['student']]
    errors = Section(
        'Boundaries and interiors', 'Pixels by their distance from the nearest edge between two classes of the truth. '
        'Boundary IoU is the IoU of what lies within 2 % of the diagonal from the edge of a class.')
    errors.plots = [plots.bars('Wrong pixels, by distance from an edge', spans, {
        ROLES[role]: [None if row['error'] is None else 100 * row['error'] for row in rows[role]] for role in roles},
        '% of the pixels there; distance in pixels', {ROLES[role]: plots.COLOURS[role] for role in roles})]
    classes = Section('Classes', tables=_classes(report, 'pixels', [('IoU', 'iou'), ('boundary IoU', 'boundary_iou')]))
    return [scores, errors, classes, _confusion(report), _calibration(
        report, 'The score of a pixel is the softmax of its class.')]


def _confusion(report: Dict[str, Any]) -> Section:
    section = Section('Mix-ups', 'What the student takes for what, and how often the teacher does.')
    student, teacher = report['models']['student'], report['models'].get('teacher')
    names = report['classes']
    head = ['truth', 'taken for', 'pixels', '% of the class'] + (['teacher, %'] if teacher else [])
    rows = []
    for pair in student['mixed']:
        row = [pair['truth'], pair['predicted'], f'{pair["pixels"]:,}'.replace(',', ' '), percent(pair['share'])]
        if teacher:
            row.append(percent(teacher['confusion'][names.index(pair['truth'])][names.index(pair['predicted'])]))
        rows.append(row)
    if rows:
        section.tables = [Table(head, rows, beside=True).values()]
    heat = [[name, *(dict(text=percent(share, 0) if share >= 0.005 else '', kind='', style=(
        f'background: rgba(43, 138, 107, {0.75 * share:.2f})' if row == column else
        f'background: rgba(217, 60, 60, {min(3 * share, 0.85):.2f})')) for column, share in enumerate(shares))]
        for row, (name, shares) in enumerate(zip(names, student['confusion']))]
    section.tables.append(Table(['truth (rows), taken for', *names], heat, "the student's whole table, % of each row",
                                'heat').values())
    return section


# ---------------------------------------------------------------------------------------------------------------------
# agreement


def _agreement(report: Dict[str, Any]) -> Section:
    found = report.get('agreement') or {}
    section = Section(
        'Agreement with the teacher', 'Linear CKA of the features of both models at the same places of the same '
        'images: 1 is the same up to a rotation, 0 is unrelated. A student may be good without it, and learns by it '
        'where a loss compares features.')
    levels = list(found.get('student') or {})
    if levels:
        groups = {ROLES[role]: [found[role].get(level) for level in levels] for role in ('student', 'plain')
                  if found.get(role)}
        section.plots.append(plots.bars('At the last checkpoint, by level', levels, groups, 'CKA with the teacher', {
            ROLES[role]: colour for role, colour in plots.COLOURS.items()}))
    history = found.get('history') or []
    if len(history) > 1:
        places = list(dict.fromkeys(level.split()[0] for level in levels))
        section.plots.append(plots.lines('Over the training, mean of the levels', [
            (place, plots.OTHERS[index % len(plots.OTHERS)],
             [(entry['step'], mean_at(entry['cka'], place)) for entry in history])
            for index, place in enumerate(places)], 'checkpoint (epoch or iteration)', 'CKA with the teacher',
            marks=True))
    logged = {key: points for key, points in (found.get('logged') or {}).items()
              if len({value for _, value in points}) > 1}
    if logged:
        section.plots.append(plots.lines('In the log of the training', [
            (key.removeprefix('kd_agree_'), plots.OTHERS[index % len(plots.OTHERS)], [tuple(point) for point in points])
            for index, (key, points) in enumerate(logged.items())], 'iteration', 'kd_agree'))
    return section
