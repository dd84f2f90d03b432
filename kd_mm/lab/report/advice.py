"""What the numbers of a report suggest to try next: a table of rules.

A rule looks at the report's dict (the JSON), and says what it has seen or nothing.  It suggests; that it helps can only
be measured.
"""

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

from kd_mm.hosts.table import DETECTION, SEGMENTATION
from kd_mm.lab.report.agreement import lowest, mean_at

BOTH = 'both'
#: Smallest difference of a score (a share of 1) that is spoken of, and fewest objects of a class or size.
LEAST, FEWEST = 0.01, 10
#: Types of errors as the beginning of a sentence.
WORDS = {'classification': 'Wrong classes', 'localisation': 'Boxes at a wrong place',
         'both': 'Boxes of a wrong class at a wrong place', 'duplicate': 'Second boxes on one object',
         'background': 'Boxes on the background', 'missed': 'Missed objects'}

Report = Dict[str, Any]
#: The report -> what was seen, as a sentence; None where the rule does not apply.
Look = Callable[[Report], Optional[str]]


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        name: an identifier.
        task: ``'detection'``, ``'segmentation'`` or ``'both'``.
        when: the condition in words, for the documentation.
        look: says what it has seen, or None.
        suggest: what to try, in words.
        methods: classes of losses and regions that it names.
    """

    name: str
    task: str
    when: str
    look: Look
    suggest: str
    methods: Tuple[str, ...] = ()


def _score(report: Report, role: str) -> Optional[float]:
    value: Optional[float] = report['models'].get(role, {}).get('score')
    return value


def _points(value: float) -> str:
    """A share of 1 as points of 100.

    Example:
        >>> _points(0.0312)
        '3.1'
    """
    return f'{100 * value:.1f}'


def _gap(report: Report) -> float:
    student, teacher = _score(report, 'student'), _score(report, 'teacher')
    return 0.0 if student is None or teacher is None else teacher - student


def weak_teacher(report: Report) -> Optional[str]:
    student, teacher = _score(report, 'student'), _score(report, 'teacher')
    if student is None or teacher is None or teacher - student > LEAST / 2:
        return None
    return f'{report["metric"]}: teacher {_points(teacher)}, student {_points(student)}.'


def no_gain(report: Report) -> Optional[str]:
    student, plain = _score(report, 'student'), _score(report, 'plain')
    if student is None or plain is None or student - plain >= LEAST / 2:
        return None
    return f'{report["metric"]}: plain student {_points(plain)}, distilled {_points(student)}.'


def weak_level(report: Report) -> Optional[str]:
    found: Dict[str, float] = {
        key: value for key, value in report.get('agreement', {}).get('student', {}).items()
        if value is not None and key.split()[0] in ('@backbone', '@neck')}
    worst = lowest({**found})
    if worst is None or len(found) < 2:
        return None
    others = [value for key, value in found.items() if key != worst]
    mean = sum(others) / len(others)
    if found[worst] > 0.6 or mean - found[worst] < 0.15:
        return None
    return f'CKA with the teacher is {found[worst]:.2f} at level {worst}, and {mean:.2f} on average at the others.'


def _course(report: Report) -> List[float]:
    """Mean CKA at backbone and neck at each checkpoint."""
    means = [mean_at(entry['cka'], '@backbone', '@neck') for entry in report.get('agreement', {}).get('history', ())]
    return [mean for mean in means if mean is not None]


def falling(report: Report) -> Optional[str]:
    course = _course(report)
    if len(course) < 3 or max(course) - course[-1] < 0.05:
        return None
    return f'Mean CKA with the teacher was {max(course):.2f} and is {course[-1]:.2f} at the end.'


def flat(report: Report) -> Optional[str]:
    course = _course(report)
    if len(course) < 3 or course[-1] > 0.8 or course[-1] - course[0] > 0.02:
        return None
    return f'Mean CKA with the teacher was {course[0]:.2f} at the first checkpoint and is {course[-1]:.2f} at the last.'


def uncalibrated(report: Report) -> Optional[str]:
    student, teacher = ((report['models'].get(role, {}).get('calibration') or {}).get('ece')
                        for role in ('student', 'teacher'))
    if student is None or teacher is None or student - teacher < 0.03:
        return None
    too = 'high' if (report['models']['student']['calibration']['gap'] or 0) > 0 else 'low'
    return f'Calibration error: student {_points(student)}, teacher {_points(teacher)}; its scores are too {too}.'


def costs(kind: str) -> Look:
    """A type of error is one of the two by which the student loses most AP against the teacher."""

    def look(report: Report) -> Optional[str]:
        found = [report['models'].get(role, {}).get('errors', {}).get('cost') for role in ('student', 'teacher')]
        if None in found:
            return None
        gaps = {name: found[0][name] - found[1][name] for name in found[0]}
        if gaps[kind] < LEAST or kind not in sorted(gaps, key=gaps.__getitem__)[-2:]:
            return None
        return (f'{WORDS[kind]} cost the student {_points(found[0][kind])} points of AP at 0.5, and the teacher '
                f'{_points(found[1][kind])}.')

    return look


def lost(table: Dict[str, int]) -> Optional[float]:
    """Share of what the teacher has right that the student has wrong; None where it is too little to say.

    Example:
        >>> lost(dict(both=15, teacher=5, student=1, neither=7))
        0.25
    """
    total = table['both'] + table['teacher']
    return table['teacher'] / total if total >= FEWEST else None


def small_objects(report: Report) -> Optional[str]:
    sizes = report.get('compared', {}).get('sizes')
    if not sizes:
        return None
    share = {name: lost(table) for name, table in sizes.items()}
    small, rest = share['small'], [value for name in ('medium', 'large') if (value := share[name]) is not None]
    if small is None or not rest or small - min(rest) < 0.1:
        return None
    return (f'Of the small objects that the teacher finds the student misses {100 * small:.0f} %, and '
            f'{100 * min(rest):.0f} % of larger ones.')


def small_segments(report: Report) -> Optional[str]:
    found = [report['models'].get(role, {}).get('sizes') for role in ('student', 'teacher')]
    if None in found:
        return None
    gaps = {name: found[1][name] - found[0][name] for name in found[0]
            if found[0][name] is not None and found[1][name] is not None}
    if 'small' not in gaps or 'large' not in gaps or gaps['small'] - gaps['large'] < 0.05:
        return None
    return (f'In small segments the student has {_points(gaps["small"])} points fewer pixels right than the teacher, '
            f'in large ones {_points(gaps["large"])}.')


def one_class(report: Report) -> Optional[str]:
    rows = [report['models'].get(role, {}).get('classes') for role in ('student', 'teacher')]
    if None in rows or len(rows[0]) < 3:
        return None
    key, many = ('ap', 'objects') if report['task'] == DETECTION else ('iou', 'pixels')
    gaps = {one['name']: two[key] - one[key] for one, two in zip(*rows)
            if one[key] is not None and two[key] is not None and one[many] >= FEWEST}
    if len(gaps) < 3:
        return None
    mean = sum(gaps.values()) / len(gaps)
    worst = sorted((name for name in gaps if gaps[name] - mean > 0.1), key=lambda name: -gaps[name])[:3]
    if not worst:
        return None
    named = ', '.join(f'{name} {_points(gaps[name])}' for name in worst)
    return f'Points below the teacher: {named}; {_points(mean)} on average over the classes.'


def _by_distance(report: Report) -> Optional[Tuple[float, float]]:
    """How much more of the pixels near an edge, and far from one, the student has wrong than the teacher."""
    rows = [report['models'].get(role, {}).get('distance') for role in ('student', 'teacher')]
    if None in rows:
        return None
    gaps = []
    for chosen in (range(2), range(len(rows[0]) - 1, len(rows[0]))):
        pixels = sum(rows[0][index]['pixels'] for index in chosen)
        if not pixels:
            return None
        wrong = [sum((side[index]['error'] or 0) * side[index]['pixels'] for index in chosen) for side in rows]
        gaps.append((wrong[0] - wrong[1]) / pixels)
    return gaps[0], gaps[1]


def boundaries(report: Report) -> Optional[str]:
    gaps = _by_distance(report)
    if gaps is None or gaps[0] < 0.02 or gaps[0] < 2 * gaps[1]:
        return None
    return (f'Within 4 pixels of an edge {_points(gaps[0])} points more pixels are wrong than with the teacher, beyond '
            f'16 pixels {_points(gaps[1])}.')


def interiors(report: Report) -> Optional[str]:
    gaps = _by_distance(report)
    if gaps is None or gaps[1] < LEAST or gaps[0] >= 2 * gaps[1]:
        return None
    return (f'More than 16 pixels from any edge {_points(gaps[1])} points more pixels are wrong than with the teacher, '
            f'near edges {_points(gaps[0])}: whole areas get another class.')


def mixed_up(report: Report) -> Optional[str]:
    student, teacher = (report['models'].get(role, {}) for role in ('student', 'teacher'))
    if 'mixed' not in student or 'confusion' not in teacher:
        return None
    names = [row['name'] for row in teacher['classes']]
    for pair in student['mixed']:
        theirs = teacher['confusion'][names.index(pair['truth'])][names.index(pair['predicted'])]
        if pair['share'] >= 0.05 and theirs < 0.5 * pair['share']:
            return (f'{_points(pair["share"])} % of {pair["truth"]} is taken for {pair["predicted"]}; with the teacher '
                    f'{_points(theirs)} %.')
    return None


#: The table, what matters most first.
RULES: Tuple[Rule, ...] = (
    Rule('weak_teacher', BOTH, 'the teacher is less than half a point better than the student', weak_teacher,
         'There is little left to learn from this teacher on these data. Train it longer or take a better one; if the '
         'student has caught up with it, let distillation end earlier (`WindowSchedule`).'),
    Rule('no_gain', BOTH, 'the distilled student is less than half a point better than the plain one', no_gain,
         "First see whether it is so: `kd-mm compare` with three seeds of both. Then `loss_weight='auto'`, and another "
         'recipe (`kd-mm recipes`).'),
    Rule('missed', DETECTION, 'missed objects are one of the two types of errors that cost the student most, against '
         'what they cost the teacher: a point of AP at 0.5 or more', costs('missed'),
         'Let the student imitate features where objects are: a loss on the neck that weighs objects (`FGDLoss`, '
         '`MimicLoss`), or any with `region=dict(type=\'GTBoxRegion\')`.', ('FGDLoss', 'MimicLoss', 'GTBoxRegion')),
    Rule('classification', DETECTION, 'wrong classes are one of the two', costs('classification'),
         'Let the student learn class scores: `CrossKDLoss` where the heads are alike, else `BCKDLoss` or '
         "`SigmoidKDLoss` at `'@logits'`; for two-stage detectors `'@roi_logits'`.",
         ('CrossKDLoss', 'BCKDLoss', 'SigmoidKDLoss')),
    Rule('localisation', DETECTION, 'boxes at a wrong place are one of the two', costs('localisation'),
         'Let the student learn boxes: `LDLoss` for heads with distributions of sides (GFL), `CrossKDLoss`, or '
         '`ChenBoxLoss` on shared proposals.', ('LDLoss', 'CrossKDLoss', 'ChenBoxLoss')),
    Rule('both', DETECTION, 'boxes of a wrong class at a wrong place are one of the two', costs('both'),
         'Class and place together are what a loss on whole heads sees: `CrossKDLoss` or `GIDLoss`.',
         ('CrossKDLoss', 'GIDLoss')),
    Rule('background', DETECTION, 'boxes on the background are one of the two', costs('background'),
         'Let the student learn what is no object: a loss with a term for the background (`DeFeatLoss`, `FGDLoss`), or '
         "`region=dict(type='PredictionGapRegion')`, which looks where both disagree.",
         ('DeFeatLoss', 'FGDLoss', 'PredictionGapRegion')),
    Rule('duplicate', DETECTION, 'second boxes on one object are one of the two', costs('duplicate'),
         'Look at `test_cfg.nms` first. Then let the student learn the order of the scores: `RMLoss`.', ('RMLoss', )),
    Rule('small_objects', DETECTION, 'of the small objects that the teacher finds the student misses a share that is '
         'at least 0.1 above that of larger ones', small_objects,
         'Put the weight on the fine levels (`levels=`, or `loss_weight` as a list), and look at the size of the '
         'input: a small student needs more pixels to see small objects.'),
    Rule('boundaries', SEGMENTATION, 'near edges the student loses at least 2 points against the teacher, and twice as '
         'many as far from them', boundaries,
         "Look at edges by themselves: `BPKDLoss`, or any loss with `region=dict(type='EdgeRegion')`.",
         ('BPKDLoss', 'EdgeRegion')),
    Rule('interiors', SEGMENTATION, 'far from edges the student loses at least 1 point, and near them less than twice '
         'as much', interiors,
         'What is missing is context, not detail: deep features (`ReviewKDLoss` at the backbone), or `CWDLoss`.',
         ('ReviewKDLoss', 'CWDLoss')),
    Rule('mixed_up', SEGMENTATION, 'at least 5 % of a class is taken for another one, more than twice as much as with '
         'the teacher', mixed_up,
         'Let the student learn how classes lie to each other: `DISTLoss`, `IFVDLoss` or `CIRKDMiniBatchLoss`.',
         ('DISTLoss', 'IFVDLoss', 'CIRKDMiniBatchLoss')),
    Rule('small_segments', SEGMENTATION, 'in small segments the student loses at least 5 points more than in large '
         'ones', small_segments,
         'Train on larger crops or a finer output (a smaller stride), and imitate a finer stage as well (`levels=`).'),
    Rule('one_class', DETECTION, 'some classes of at least three lie 10 points further below the teacher than the '
         'average', one_class,
         'Look at these classes in the pictures of the page first: few or wrong annotations look the same. Then more '
         'pictures of them.'),
    Rule('one_class', SEGMENTATION, 'some classes of at least three lie 10 points further below the teacher than the '
         'average', one_class,
         'Look at these classes in the pictures of the page first: few or wrong annotations look the same. Then '
         "`region=dict(type='SegClassRegion')`, or more pictures of them.", ('SegClassRegion', )),
    Rule('uncalibrated', DETECTION, 'the calibration error is 3 points above that of the teacher', uncalibrated,
         "Add a loss on class scores: `CrossKDLoss`, or `BCKDLoss` at `'@logits'`.", ('CrossKDLoss', 'BCKDLoss')),
    Rule('uncalibrated', SEGMENTATION, 'the calibration error is 3 points above that of the teacher', uncalibrated,
         "Add a loss on the logits of each pixel: `DISTLoss` or `SoftmaxKDLoss` at `'@logits'`.",
         ('DISTLoss', 'SoftmaxKDLoss')),
    Rule('weak_level', BOTH, 'a level of backbone or neck has a CKA below 0.6 that is 0.15 below the mean of the '
         'others', weak_level,
         'Distil at that level: a loss on features with `levels=` there, or a larger weight of it in the list of '
         '`loss_weight`.'),
    Rule('falling', BOTH, 'the mean CKA at the end is 0.05 below its best checkpoint', falling,
         'The student leaves its teacher again: try a weight that does not fall to 0, or a lower learning rate at the '
         'end.'),
    Rule('flat', BOTH, 'the mean CKA has not grown by 0.02 from the first checkpoint to the last, and is below '
         '0.8', flat, 'The terms pull too little, or at another place: look at the shares in `kd-mm check CONFIG`, and '
         "try `loss_weight='auto'`."),
)


def advise(report: Report) -> List[Dict[str, Any]]:
    """The rules that apply: dicts of ``name``, ``seen``, ``suggest`` and ``there``, in the order of the table.

    ``there`` are the methods of a suggestion that the student's config has already (``report['losses']``).  Where the
    teacher is no better, what it could teach is not asked.
    """
    found = []
    for rule in RULES:
        if rule.task not in (BOTH, report['task']):
            continue
        seen = rule.look(report)
        if seen:
            there = [name for name in rule.methods if name in report.get('losses', ())]
            found.append(dict(name=rule.name, seen=seen, suggest=rule.suggest, there=there))
    if found and found[0]['name'] == 'weak_teacher':
        return [entry for entry in found if entry['name'] in ('weak_teacher', 'no_gain')]
    return found
