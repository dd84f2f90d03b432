"""The demo's report: numbers from the logs of mmengine, pictures from the checkpoints, one HTML and one Markdown file.

Nothing is computed here that the logs do not hold; a distilled student that is worse is called worse.
"""

import base64
import html
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
from stages import read_scalars, seconds_per_iter

ROOT = Path(__file__).resolve().parents[2]
NAMES = {'teacher': 'teacher', 'student': 'plain student', 'distilled': 'distilled student'}
COLOURS = {'teacher': '#8a8f98', 'student': '#d9822b', 'distilled': '#2b8a6b'}
METRIC_NAMES = {'coco/bbox_mAP': 'COCO mAP', 'mIoU': 'mIoU'}

#: What :func:`collect` returns: task key -> its numbers.
Results = Dict[str, Dict[str, Any]]
Point = Tuple[float, float]
Curve = Tuple[str, str, List[Point]]


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def in_percent(metric: str, value: float) -> float:
    """CocoMetric counts from 0 to 1, IoUMetric from 0 to 100."""
    return 100 * value if metric.startswith('coco/') else value


def collect(stages: Sequence[Any], quick: bool = False) -> Results:
    """Results by task key, as plain data (``render`` and the tests need nothing else).

    Returns:
        dict: task key -> dict(title, metric, quick, runs=[dict(role, seed, score, seconds, loss=[(iter, value)],
        metric=[(iter, value)])]).
    """
    results: Results = {}
    for stage in stages:
        task = stage.task
        entry = results.setdefault(task.key, dict(title=task.title, metric=task.metric, quick=quick, runs=[]))
        train, val = read_scalars(stage.work_dir)
        last = max((iteration(row) for row in train), default=stage.total_iters)
        steps = [row['step'] for row in val if task.metric in row]
        # Loops by epoch count validations in epochs; curves are over iterations.
        scale = last / steps[-1] if steps else 1
        curve = [(row['step'] * scale, in_percent(task.metric, row[task.metric])) for row in val if task.metric in row]
        if not curve:
            raise RuntimeError(f'{stage.title}: no {task.metric} in the logs below {stage.work_dir}')
        entry['runs'].append(dict(
            role=stage.role, seed=stage.seed, score=curve[-1][1], seconds=seconds_per_iter(train), metric=curve,
            loss=[(iteration(row), task_loss(row, stage.kd_terms)) for row in train]))
    return results


def iteration(row: Dict[str, Any]) -> int:
    return row['iter' if 'iter' in row else 'step']


def task_loss(row: Dict[str, float], kd_terms: Sequence[str] = ()) -> float:
    """The student's own loss: the total without the terms that distillation adds."""
    return row['loss'] - sum(row[name] for name in kd_terms if name in row)


def mean_and_spread(values: Sequence[float]) -> Tuple[float, Optional[float]]:
    """Mean and sample standard deviation (None for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def summary(entry: Dict[str, Any]) -> Dict[str, Any]:
    """Per role: mean, spread, seconds an iteration; the gap closed in percent; the measured cost of distillation."""
    roles: Dict[str, Dict[str, Any]] = {}
    for role in NAMES:
        runs = [run for run in entry['runs'] if run['role'] == role]
        mean, spread = mean_and_spread([run['score'] for run in runs])
        roles[role] = dict(mean=mean, spread=spread, seconds=statistics.fmean([run['seconds'] for run in runs]),
                           scores=[run['score'] for run in runs])
    gap = roles['teacher']['mean'] - roles['student']['mean']
    gain = roles['distilled']['mean'] - roles['student']['mean']
    return dict(roles=roles, gap=gap, gain=gain, closed=100 * gain / gap if gap > 0 else None,
                overhead=roles['distilled']['seconds'] / roles['student']['seconds'])


def verdict(entry: Dict[str, Any]) -> str:
    """What the numbers say, in words."""
    numbers = summary(entry)
    if entry['quick']:
        return 'A quick run: it shows that everything works; its scores mean nothing.'
    gain, spread = numbers['gain'], numbers['roles']['student']['spread']
    words = f'The distilled student is {abs(gain):.1f} points {"better" if gain > 0 else "WORSE"} than the plain one'
    if spread is None:
        words += ' (one seed; run with SEEDS=3 to see the spread).'
    else:
        pair = max(spread, numbers['roles']['distilled']['spread'])
        seeds = len(numbers['roles']['student']['scores'])
        if gain <= 0:
            words += f' over {seeds} seeds.'
        elif gain >= pair:
            words += f' over {seeds} seeds, {gain / pair:.1f} standard deviations (the larger of the two spreads).'
        else:
            words += (f' over {seeds} seeds, which is less than one standard deviation ({pair:.1f}): not a result to '
                      'rely on.')
    if gain <= 0:
        words += ' Distillation did not help here.'
    if numbers['gap'] <= 0:
        words += ' The teacher is no better than the plain student, so there was no gap to close.'
    return words


def score_text(role: Dict[str, Any]) -> str:
    return f'{role["mean"]:.1f}' + ('' if role['spread'] is None else f' ± {role["spread"]:.1f}')


def table(results: Results) -> str:
    """The Markdown table."""
    lines = ['| task | metric | teacher | plain student | distilled student | gain | gap closed | '
             's/iter teacher / plain / distilled | distilled / plain |',
             '|---|---|---|---|---|---|---|---|---|']
    for entry in results.values():
        numbers = summary(entry)
        roles = numbers['roles']
        closed = '-' if numbers['closed'] is None or entry['quick'] else f'{numbers["closed"]:.0f} %'
        gain = '-' if entry['quick'] else f'{numbers["gain"]:+.1f}'
        cells = [entry['title'], METRIC_NAMES.get(entry['metric'], entry['metric']),
                 *(score_text(roles[role]) for role in NAMES), gain, closed,
                 ' / '.join(f'{roles[role]["seconds"]:.3f}' for role in NAMES), f'{numbers["overhead"]:.2f}']
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def notes(results: Results) -> List[str]:
    """What a reader needs to know to read the table."""
    seeds = max(len([run for run in entry['runs'] if run['role'] == 'student']) for entry in results.values())
    lines = ['Same data, schedule and optimizer for all three; everything is trained from scratch. '
             'The score is that of the last validation, not the best one.']
    if seeds > 1:
        lines.append(f'Students: mean ± sample standard deviation over {seeds} seeds. One teacher (seed 0) a task.')
    lines.append('Seconds an iteration are medians over the log, with two trainings sharing the machine. '
                 '"distilled / plain" contains the teacher\'s forward pass.')
    return lines


def markdown(results: Results, profile: Optional[Dict[str, str]] = None) -> str:
    parts = ['# Distillation demo\n', table(results)]
    for entry in results.values():
        parts.append(f'- **{entry["title"]}**: {verdict(entry)}')
    parts.append('')
    parts += notes(results)
    parts += ['', '| task | role | seed | score | s/iter |', '|---|---|---|---|---|']
    for key, entry in results.items():
        parts += [f'| {key} | {NAMES[run["role"]]} | {run["seed"]} | {run["score"]:.2f} | {run["seconds"]:.3f} |'
                  for run in entry['runs']]
    if profile:
        parts += ['', '## Cost of distillation (tools/measure.py)', '']
        parts += [f'### {title}\n\n```\n{text}\n```\n' for title, text in profile.items()]
    return '\n'.join(parts) + '\n'


# ---------------------------------------------------------------------------------------------------------------------
# curves: inline SVG that takes the page's text colour, so that it is readable on light and on dark


def chart(title: str, curves: Sequence[Curve], low: Optional[float] = None, width: int = 460, height: int = 230) -> str:
    """A line chart; ``curves`` is a list of (name, colour, [(x, y)])."""
    curves = [(name, colour, [(x, y) for x, y in points if np.isfinite(y)]) for name, colour, points in curves]
    points = [point for _, _, curve in curves for point in curve]
    if not points:
        return ''
    left, bottom, top, right = 46, 30, 26, 10
    x_max = max(x for x, _ in points) or 1
    ys = sorted(y for _, y in points)
    # The first few losses would flatten everything else.
    y_max = ys[-1] if low is not None else ys[int(0.98 * (len(ys) - 1))]
    y_min = low if low is not None else ys[0]
    y_max = max(y_max, y_min + 1e-6)

    def place(x: float, y: float) -> Tuple[float, float]:
        return (left + (width - left - right) * x / x_max,
                height - bottom - (height - bottom - top) * (min(max(y, y_min), y_max) - y_min) / (y_max - y_min))

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">',
             f'<text x="{left}" y="15" class="t">{html.escape(title)}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = y_min + share * (y_max - y_min)
        _, y = place(0, value)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" class="g"/>'
                     f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        x, _ = place(share * x_max, y_min)
        parts.append(f'<text x="{x:.1f}" y="{height - 12}" text-anchor="middle">{share * x_max:.0f}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 1}" text-anchor="end">iteration</text>')
    for name, colour, curve in curves:
        path = ' '.join(f'{x:.1f},{y:.1f}' for x, y in (place(*point) for point in curve))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8">'
                     f'<title>{html.escape(name)}</title></polyline>')
    return ''.join(parts) + '</svg>'


def smooth(points: Sequence[Point], window: int = 5) -> List[Point]:
    values = [y for _, y in points]
    return [(x, statistics.fmean(values[max(0, i - window + 1):i + 1])) for i, (x, _) in enumerate(points)]


def charts(entry: Dict[str, Any]) -> str:
    loss, score = [], []
    for run in entry['runs']:
        name = f'{NAMES[run["role"]]}, seed {run["seed"]}'
        loss.append((name, COLOURS[run['role']], smooth(run['loss'])))
        score.append((name, COLOURS[run['role']], run['metric']))
    metric = METRIC_NAMES.get(entry['metric'], entry['metric'])
    return chart('task loss (training, without the distillation terms)', loss) + chart(
        f'{metric} (validation)', score, low=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def palette(count: int) -> np.ndarray:
    """Colours that neighbours in the list can be told apart by, BGR uint8 (count, 3)."""
    hue = (np.arange(count) * 0.618 * 180 % 180).astype(np.uint8)
    hsv = np.stack([hue, np.full(count, 190, np.uint8), np.full(count, 235, np.uint8)], 1)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2BGR)[0]


def draw_boxes(image: np.ndarray, boxes: Any, labels: Any, classes: Sequence[str], zoom: int) -> np.ndarray:
    image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    colours = palette(len(classes))
    for box, label in zip(boxes, labels):
        x1, y1, x2, y2 = (int(round(float(v) * zoom)) for v in box)
        tint = tuple(int(v) for v in colours[int(label)])
        cv2.rectangle(image, (x1, y1), (x2, y2), tint, 2)
        cv2.putText(image, classes[int(label)], (x1 + 3, max(y1 + 12, 12)), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 3)
        cv2.putText(image, classes[int(label)], (x1 + 3, max(y1 + 12, 12)), cv2.FONT_HERSHEY_SIMPLEX, 0.4, tint, 1)
    return image


def draw_labels(labels: np.ndarray, colours: np.ndarray, zoom: int) -> np.ndarray:
    picture = np.full((*labels.shape, 3), 128, np.uint8)
    known = labels < len(colours)
    picture[known] = colours[labels[known]]
    return cv2.resize(picture, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST)


def as_data_url(image: np.ndarray) -> str:
    ok, data = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert ok
    return 'data:image/jpeg;base64,' + base64.b64encode(data.tobytes()).decode()


def draw_pictures(stages: Sequence[Any], count: int = 4, width: int = 300) -> Dict[str, List[List[Tuple[str, str]]]]:
    """Predictions side by side, for ``count`` validation images of each task (students of the first seed).

    Returns:
        dict: task key -> list of rows, a row being a list of (caption, data URL).
    """
    from mmengine.config import Config

    pictures = {}
    for task in dict.fromkeys(stage.task for stage in stages):
        chosen = {s.role: s for s in stages if s.task is task and s.seed == 0}
        config = Config.fromfile(str(task.path('student')))
        prepared = predict_all(task, config, chosen, count)
        pictures[task.key] = [
            [(caption, as_data_url(shrink(image, width))) for caption, image in row] for row in prepared]
    return pictures


def shrink(image: np.ndarray, width: int) -> np.ndarray:
    return cv2.resize(image, (width, round(image.shape[0] * width / image.shape[1])), interpolation=cv2.INTER_AREA)


def read_image(path: str) -> np.ndarray:
    image = cv2.imread(path)
    assert image is not None, path
    return image


def predict_all(task: Any, config: Any, chosen: Dict[str, Any], count: int) -> List[List[Tuple[str, np.ndarray]]]:
    import torch
    from mmengine.registry import init_default_scope

    from kd_mm.lab.commands.train import move_data_root  # the same meaning of data_root as in training

    init_default_scope(task.host)
    move_data_root(config, config.data_root, chosen['student'].data_root)
    dataset = build_dataset(task, config)
    spread = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    samples = [dataset[i] for i in spread]
    rows = []
    for sample in samples:
        meta = sample['data_samples'].metainfo
        image = read_image(meta['img_path'])
        zoom = max(1, round(320 / image.shape[1]))
        rows.append([('image', cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)),
                     ('ground truth', ground_truth(task, sample['data_samples'], image, dataset, zoom))])
    for role in ('student', 'distilled', 'teacher'):
        model = load_model(chosen[role])
        with torch.no_grad():
            for row, sample in zip(rows, samples):
                image = read_image(sample['data_samples'].metainfo['img_path'])
                batch = dict(inputs=[sample['inputs']], data_samples=[sample['data_samples'].clone()])
                prediction = model.test_step(batch)[0]
                row.append((NAMES[role], draw_prediction(task, prediction, image, dataset)))
    return rows


def build_dataset(task: Any, config: Any) -> Any:
    if task.host == 'mmdet':
        from mmdet.registry import DATASETS
    else:
        from mmseg.registry import DATASETS
    dataset = DATASETS.build(config.val_dataloader.dataset)
    if hasattr(dataset, 'full_init'):
        dataset.full_init()
    return dataset


def load_model(stage: Any) -> Any:
    """The network of a finished stage from its plain config: a distilled checkpoint is a stock student's."""
    from mmengine.config import Config
    from mmengine.runner import load_checkpoint

    from kd_mm.hosts.checkpoint import allow_mmengine_checkpoints
    if stage.task.host == 'mmdet':
        from mmdet.registry import MODELS
    else:
        from mmseg.registry import MODELS
    role = 'student' if stage.role == 'distilled' else stage.role
    model = MODELS.build(Config.fromfile(str(stage.task.path(role))).model)
    allow_mmengine_checkpoints()
    load_checkpoint(model, str(stage.checkpoint()), map_location='cpu', strict=True)
    return model.eval()


def ground_truth(task: Any, sample: Any, image: np.ndarray, dataset: Any, zoom: int) -> np.ndarray:
    if task.host == 'mmdet':
        instances = sample.gt_instances
        boxes = getattr(instances.bboxes, 'tensor', instances.bboxes)
        # The boxes may or may not have been resized with the image: the pipeline's place of LoadAnnotations decides.
        return draw_boxes(image, boxes, instances.labels, dataset.metainfo['classes'], zoom)
    return draw_labels(sample.gt_sem_seg.data[0].numpy(), np.array(dataset.metainfo['palette'])[:, ::-1], zoom)


def draw_prediction(task: Any, prediction: Any, image: np.ndarray, dataset: Any, threshold: float = 0.3) -> np.ndarray:
    zoom = max(1, round(320 / image.shape[1]))
    if task.host == 'mmdet':
        instances = prediction.pred_instances
        keep = instances.scores > threshold
        return draw_boxes(image, instances.bboxes[keep], instances.labels[keep], dataset.metainfo['classes'], zoom)
    return draw_labels(prediction.pred_sem_seg.data[0].numpy(), np.array(dataset.metainfo['palette'])[:, ::-1], zoom)


# ---------------------------------------------------------------------------------------------------------------------
# cost of distillation, measured in one process


def run_profile(stages: Sequence[Any], steps: int = 5, timeout: float = 120) -> Dict[str, str]:
    """Output of ``tools/measure.py`` for each distilled config, where the tool is there and works."""
    tool = ROOT / 'tools' / 'measure.py'
    texts: Dict[str, str] = {}
    if not tool.exists():
        return texts
    for stage in stages:
        if stage.role != 'distilled' or stage.seed != 0:
            continue
        command = [sys.executable, str(tool), str(stage.task.path('distilled')), '--steps', str(steps), '--batch', '4',
                   '--shape', *map(str, stage.task.shape),
                   '--cfg-options', f'custom_hooks.0.teacher_ckpt={stage.teacher.checkpoint()}']
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            continue
        if done.returncode == 0:
            texts[stage.task.title] = done.stdout.strip()
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# the page

STYLE = '''
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 14px; } .wide { overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .35em .7em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg { width: 460px; max-width: 100%; font: 11px system-ui, sans-serif; fill: currentColor; }
svg .g { stroke: var(--line); } svg .t { font-size: 13px; font-weight: 600; }
.row { display: grid; grid-template-columns: repeat(5, 1fr); gap: 6px; margin-bottom: 8px; }
.row figure { margin: 0; } .row img { width: 100%; border-radius: 3px; } figcaption { font-size: 12px; opacity: .75; }
.verdict { background: var(--soft); padding: .6em .9em; border-radius: 6px; }
.key span { display: inline-block; width: 1.6em; height: 3px; vertical-align: middle; margin: 0 .4em 0 1em; }
pre { background: var(--soft); padding: .8em; overflow-x: auto; font-size: 12px; }
'''


def page(results: Results, pictures: Dict[str, List[List[Tuple[str, str]]]],
         profile: Optional[Dict[str, str]] = None) -> str:
    parts = ['<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Distillation demo</title>',
             '<meta name="viewport" content="width=device-width, initial-scale=1">',
             f'<style>{STYLE}</style></head><body>',
             '<h1>Distillation demo</h1>', '<div class="wide">', html_table(table(results)), '</div>']
    parts += [f'<p>{html.escape(line)}</p>' for line in notes(results)]
    for key, entry in results.items():
        parts += [f'<h2>{html.escape(entry["title"])}</h2>', f'<p class="verdict">{html.escape(verdict(entry))}</p>',
                  '<p class="key">', *(f'<span style="background:{COLOURS[r]}"></span>{NAMES[r]}' for r in NAMES),
                  '</p>', charts(entry)]
        for row in pictures.get(key, []):
            parts.append('<div class="row">' + ''.join(
                f'<figure><img src="{url}" alt="{html.escape(caption)}"><figcaption>{html.escape(caption)}</figcaption>'
                '</figure>' for caption, url in row) + '</div>')
    for title, text in (profile or {}).items():
        parts.append(f'<h2>Cost of distillation: {html.escape(title)}</h2><pre>{html.escape(text)}</pre>')
    return '\n'.join(parts) + '</body></html>\n'


def html_table(text: str) -> str:
    """A Markdown table as HTML."""
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.strip().splitlines()]
    head = ''.join(f'<th>{html.escape(cell)}</th>' for cell in rows[0])
    body = ''.join('<tr>' + ''.join(f'<td>{html.escape(cell)}</td>' for cell in row) + '</tr>' for row in rows[2:])
    return f'<table><tr>{head}</tr>{body}</table>'


def write(work_dir: Union[str, Path], results: Results, pictures: Dict[str, List[List[Tuple[str, str]]]],
          profile: Optional[Dict[str, str]] = None) -> List[Path]:
    """Write report.md and report.html; return their paths."""
    work_dir = Path(work_dir)
    paths = [work_dir / 'report.html', work_dir / 'report.md']
    paths[0].write_text(page(results, pictures, profile), encoding='utf-8')
    paths[1].write_text(markdown(results, profile), encoding='utf-8')
    return paths
