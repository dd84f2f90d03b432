"""The numbers of a report, as one dict that JSON can hold, of what was found."""

import importlib.metadata
from typing import Any, Dict, List, Optional

import torch

import kd_mm
from kd_mm.hosts.models import scope_of_config
from kd_mm.hosts.table import DETECTION, SEGMENTATION
from kd_mm.lab.configs import hook_entries
from kd_mm.lab.report import detections, segmentation
from kd_mm.lab.report.advice import advise
from kd_mm.lab.report.gather import Found, Track
from kd_mm.lab.report.sources import ROLES, Source

#: Version of the JSON's layout.
LAYOUT = 1
#: Score by task: key, and name.
METRICS = {DETECTION: ('ap', 'COCO mAP'), SEGMENTATION: ('miou', 'mIoU')}
CASES = ('both', 'teacher', 'student', 'neither')


def numbers(found: Found, source: Source, split: str, track: Track = lambda things, what: things) -> Dict[str, Any]:
    """Everything that was measured; scores and rates are shares of 1.  ``track`` shows the progress."""
    key, name = METRICS[found.task]
    models = _detectors(found, track) if found.task == DETECTION else {
        role: segmentation.summary(counts, found.classes) for role, counts in found.counts.items()}
    for role, entry in models.items():
        side = source.sides[role]
        entry.update(score=entry[key], config=side.config, weights=side.weights, parameters=sum(
            parameter.numel() for parameter in found.models[role].model.parameters()))
    report: Dict[str, Any] = dict(
        layout=LAYOUT, task=found.task, metric=name, split=split, images=len(found.indices),
        images_in_all=len(found.dataset), classes=found.classes, work_dir=source.folder, losses=losses(source),
        models={role: models[role] for role in ROLES if role in models}, versions=versions(source), notes=found.notes)
    if 'teacher' in models:
        report['compared'] = (_objects_side_by_side if found.task == DETECTION else _pixels_side_by_side)(found, models)
        report['agreement'] = dict(
            {role: found.alike.numbers(role) for role in models if role != 'teacher'},
            shapes={f'{place} {index}': list(shape) for (place, index), shape in found.alike.shapes.items()},
            history=[dict(step=int(name.split()[1]), cka=found.alike.numbers(name)) for name in found.seen],
            logged={key: [list(point) for point in points] for key, points in source.logged.items()})
    report['advice'] = advise(report)
    return report


def losses(source: Source) -> List[str]:
    """Classes of the losses and regions of the student's distillation, without their scope."""
    found = []
    for entry in hook_entries(source.cfg):
        for loss in (entry.get('losses') or {}).values():
            for part in (loss, loss.get('region')) if hasattr(loss, 'get') else ():
                kind = part.get('type') if hasattr(part, 'get') else None
                if kind is not None:
                    found.append(str(kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2])
    return list(dict.fromkeys(found))


def versions(source: Source) -> Dict[str, Optional[str]]:
    """What it was measured with."""
    found: Dict[str, Optional[str]] = {'kd_mm': kd_mm.__version__, 'torch': str(torch.__version__)}
    for name in ('mmengine', 'mmcv', scope_of_config(source.cfg)):
        module = __import__(str(name))
        found[str(name)] = getattr(module, '__version__', None)
    for name in ('pycocotools', 'numpy'):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _detectors(found: Found, track: Track) -> Dict[str, Dict[str, Any]]:
    models = {}
    for role in track(list(found.objects), 'measuring'):
        images, judged = found.objects[role], found.judged(role)
        working = detections.best_threshold(judged)
        models[role] = dict(
            detections.precision_recall(images, found.classes), working=working,
            errors=detections.error_types(judged, len(found.classes), working['score']),
            calibration=detections.confidence(judged))
    return models


def _objects_side_by_side(found: Found, models: Dict[str, Any]) -> Dict[str, Any]:
    count = len(found.classes)
    judged = {role: found.judged(role) for role in found.objects}
    score = {role: models[role]['working']['score'] for role in judged}
    hits = {role: judged[role].hit(score[role]) for role in judged}
    result: Dict[str, Any] = detections.side_by_side(hits['student'], hits['teacher'], judged['student'], count)
    for role in ('student', 'plain'):
        if role in judged:
            pairs = [detections.same_detections(own, theirs, (score[role], score['teacher']))
                     for own, theirs in zip(found.objects[role], found.objects['teacher'])]
            common, all_ = (sum(column) for column in zip(*pairs))
            result.setdefault('shared', {})[role] = common / all_ if all_ else None
    return result


def _pixels_side_by_side(found: Found, models: Dict[str, Any]) -> Dict[str, Any]:
    table = found.beside['teacher']
    common, all_ = found.same['teacher']
    return dict(classes=[dict(zip(CASES, map(int, row))) for row in table],
                shared=dict(student=float(common / all_) if all_ else None))


def of_all(rows: List[Dict[str, int]]) -> Dict[str, int]:
    """The sum of the tables of all classes.

    Example:
        >>> of_all([dict(both=1, teacher=2, student=0, neither=0), dict(both=3, teacher=0, student=1, neither=0)])
        {'both': 4, 'teacher': 2, 'student': 1, 'neither': 0}
    """
    return {case: sum(row[case] for row in rows) for case in CASES}
