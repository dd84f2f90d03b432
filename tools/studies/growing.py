"""Classes that grow, on real data: what is kept of the old classes, and what is learned of the new ones.

    python tools/studies/growing.py --data-root PATH                    blood cells 2 + 1, CamVid 8 + 3, three seeds
    python tools/studies/growing.py --data-root PATH --task bccd --seeds 1
    python tools/studies/growing.py --render                            the table anew from the results

PATH holds bccd/ (COCO layout) and camvid_cityscapes/ (Cityscapes layout).  `kd-mm split` makes the steps.  With each
seed a model is trained on the old classes (`old`); then, each time from it, one on the images of the new classes, with
the new ones alone labelled: by itself (`fine-tuning`), and with each method; and one from scratch on all labels of all
classes (`joint`), which is what there is to reach.

Results go to docs/growing.json as they come, seed after seed, and the tables to docs/growing.md.  The same command goes
on where it was interrupted: what is in the results with the same settings is not trained again.  Two processes, each
with a --task of its own, may write to the same results.
"""

import argparse
import copy
import fcntl
import json
import math
import os
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools' / 'studies')]

import machine  # noqa: E402
import stages as engine  # noqa: E402

RESULTS, PAGE = ROOT / 'docs' / 'growing.json', ROOT / 'docs' / 'growing.md'
BEGIN, END = '<!-- growing: written by `python tools/studies/growing.py`; do not edit -->', '<!-- end of growing -->'
#: The trainings of a task besides those with a hook entry.
OLD, JOINT = 'old', 'joint'
PARTS = ('old', 'new', 'all')


class Task:
    """One data set and its steps.

    Attributes:
        key: name for the command line and in the results.
        title: for the page.
        config: of the model that knows all classes, below ``configs/``.
        folder: of the data, below the data root.
        steps: for `kd-mm split`.
        occurring: whether classes that no label has are left out.
        metric: what is given, in percent.
        iters: of every training.
        methods: hook entries by name; the teacher is put in.
    """

    def __init__(self, key: str, title: str, config: str, folder: str, steps: Sequence[str], occurring: bool,
                 metric: str, iters: int, methods: Dict[str, Dict[str, Any]]) -> None:
        self.key, self.title, self.config, self.folder = key, title, config, folder
        self.steps, self.occurring, self.metric, self.iters, self.methods = steps, occurring, metric, iters, methods

    @property
    def names(self) -> List[str]:
        """All trainings, in the order in which they run."""
        return [OLD, *self.methods, JOINT]


_DET = dict(inherit=dict(backbone='copy', neck='copy', bbox_head='grow'))
_SEG = dict(inherit=dict(backbone='copy', decode_head='grow'))
_SEG_FROM_BACKGROUND = dict(inherit=dict(backbone='copy', decode_head='grow_from_background'), task_loss_weight=0.0)
#: The weights are the published ones (the cards of the methods), and the first that were tried.
TASKS = (
    Task('bccd', 'Blood cells (BCCD), GFL: red and white cells, then platelets', 'real/bccd_student.py', 'bccd',
         ('RBC,WBC', 'Platelets'), False, 'COCO mAP', 300, {
             'fine-tuning': dict(_DET, losses=dict(loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=0.0))),
             'PKD': dict(_DET, losses=dict(loss_pkd=dict(type='PKDLoss', at='neck', loss_weight=10.0))),
             'ERD': dict(_DET, task_classes='new', losses=dict(loss_erd=dict(type='ERDLoss', at='bbox_head'))),
         }),
    Task('camvid', 'Street scenes (CamVid), PSPNet: 8 classes, then 3', 'real/camvid_student.py', 'camvid_cityscapes',
         ('8+3', ), True, 'IoU, mean over the classes', 300, {
             'fine-tuning': dict(_SEG, losses=dict(
                 loss_pkd=dict(type='PKDLoss', at='decode_head.bottleneck', loss_weight=0.0))),
             'PKD': dict(_SEG, losses=dict(
                 loss_pkd=dict(type='PKDLoss', at='decode_head.bottleneck', loss_weight=10.0))),
             'MiB': dict(_SEG_FROM_BACKGROUND, losses=dict(
                 loss_mib_ce=dict(type='MiBCELoss', at='decode_head.conv_seg', loss_weight=1.0),
                 loss_mib_kd=dict(type='MiBKDLoss', at='decode_head.conv_seg', loss_weight=10.0))),
             'PLOP': dict(_SEG_FROM_BACKGROUND, losses=dict(
                 loss_pod_stages=dict(type='LocalPODLoss', at='backbone', growth=(9, 3), loss_weight=0.01 / 6),
                 loss_pod_head=dict(type='LocalPODLoss', at='decode_head.bottleneck', growth=(9, 3),
                                    loss_weight=0.01 / 6),
                 loss_pod_logits=dict(type='LocalPODLoss', at='decode_head.conv_seg', growth=(9, 3),
                                      loss_weight=0.0005 / 6),
                 loss_pseudo=dict(type='PLOPPseudoLabelLoss', at='decode_head.conv_seg'))),
         }))
#: The learning rate after the first step, over that of the config: the model is trained already.
LATER = 0.25


# ---------------------------------------------------------------------------------------------------------------------
# configs and trainings


def split_data(task: Task, data: Path, out: Path) -> List[Any]:
    """Write the steps of a task, and what each has."""
    from kd_mm.lab.configs import read_config
    from kd_mm.lab.steps import split

    base = out / 'student.py'
    out.mkdir(parents=True, exist_ok=True)
    source = (ROOT / 'configs' / task.config).read_text(encoding='utf-8')
    source = source.replace("'../", f"'{ROOT}/configs/").replace(f"'data/{task.folder}/'", f"'{data}/'")
    base.write_text(source, encoding='utf-8')
    return split(read_config(str(base)), str(base), task.steps, str(out), occurring=task.occurring)


def config_of(task: Task, name: str, seed: int, folder: Path, run: Path, iters: int) -> Any:
    """The config of one training.

    Args:
        task: whose.
        name: of the training.
        seed: of it.
        folder: of the steps.
        run: where it writes.
        iters: its length.
    """
    from mmengine.config import Config

    cfg = Config.fromfile(str(folder / {OLD: 'step1.py', JOINT: 'joint.py'}.get(name, 'step2.py')))
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=iters + 1)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    warm = min(50, max(iters // 4, 1))
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warm),
        dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=warm, end=iters)]
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=iters, max_keep_ckpts=1)
    cfg.default_hooks.logger = dict(type='LoggerHook', interval=50, log_metric_by_epoch=False)
    cfg.log_processor = dict(type='LogProcessor', window_size=50, by_epoch=False)
    cfg.randomness = dict(seed=seed)
    cfg.work_dir, cfg.log_level, cfg.custom_hooks = str(run), 'WARNING', []
    if name in task.methods:
        cfg.optim_wrapper.optimizer.lr *= LATER
        teacher = run.parent / f'{OLD}_seed{seed}' / f'iter_{iters}.pth'
        cfg.custom_hooks = [dict(type='kd_mm.DistillHook', teacher=str(folder / 'step1.py'), teacher_ckpt=str(teacher),
                                 agreement=0, **copy.deepcopy(task.methods[name]))]
    return cfg


def train(cfg: Any) -> float:
    """Run a training; its seconds."""
    from mmengine.runner import Runner

    from kd_mm.lab.commands.evaluate import own_name

    plain = copy.deepcopy(cfg)
    for key in ('val_dataloader', 'val_evaluator', 'val_cfg', 'test_dataloader', 'test_evaluator', 'test_cfg'):
        plain[key] = None
    own_name(plain)
    begin = time.time()
    Runner.from_cfg(plain).train()
    return time.time() - begin


def scores(task: Task, cfg: Any, weights: Path, run: Path, old: Sequence[str]) -> Dict[str, Any]:
    """What a trained model scores in the validation of its step: by class, and means over old, new and all classes.

    The plain model of the config is evaluated, without the hook.  A background is no class here.
    """
    from kd_mm.lab.commands.evaluate import evaluate
    from kd_mm.ops.classes import is_background

    plain = copy.deepcopy(cfg)
    classes = [name for name in plain.val_dataloader.dataset.metainfo.classes if not is_background(name)]
    if task.metric.startswith('COCO'):
        plain.val_evaluator.classwise = True
        found = evaluate(plain, str(weights), str(run / 'val'))
        # Without a single detection the host gives no numbers.
        each = {name: 100 * found.get(f'coco/{name}_precision', 0.0) for name in classes}
    else:
        plain.val_evaluator = dict(type='ClasswiseIoU')
        found = evaluate(plain, str(weights), str(run / 'val'))
        each = {name: 100 * found[name] for name in classes}
    parts = dict(old=[name for name in classes if name in old], new=[name for name in classes if name not in old],
                 all=classes)
    return dict(classes={name: round(value, 2) for name, value in each.items()},
                **{part: round(statistics.mean(each[name] for name in names), 2) for part, names in parts.items()
                   if names})


def register_metric() -> None:
    """The host's IoU metric prints the classes and returns their mean alone."""
    from mmseg.evaluation import IoUMetric
    from mmseg.registry import METRICS

    @METRICS.register_module(force=True)
    class ClasswiseIoU(IoUMetric):  # type: ignore[misc]

        def compute_metrics(self, results: List[Any]) -> Dict[str, float]:
            inside, union = (sum(entry[index] for entry in results) for index in (0, 1))
            return {name: float(a / b) if b else math.nan
                    for name, a, b in zip(self.dataset_meta['classes'], inside, union)}


# ---------------------------------------------------------------------------------------------------------------------
# results


def load(path: Path) -> Dict[str, Any]:
    return dict(json.loads(path.read_text(encoding='utf-8'))) if path.exists() else {}


def save(path: Path, results: Dict[str, Any], task: str) -> None:
    """Write what is new of a task; a second process may be at another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tasks = {**results['tasks'], **load(path).get('tasks', {}), task: results['tasks'][task]}
        results['tasks'] = {known.key: tasks.pop(known.key) for known in TASKS if known.key in tasks} | tasks
        part = path.with_suffix('.part')
        part.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
        part.replace(path)


def settings_hash(task: Task, name: str, iters: int, steps: Sequence[Any]) -> str:
    """What a result depends on, besides the seed and kd_mm."""
    data = [[step.name, step.new, step.classes, step.images, step.labels] for step in steps]
    method = task.methods.get(name)
    return engine.hash_of(json.dumps([task.key, name, method, iters, LATER if method else 1, data], sort_keys=True),
                          (ROOT / 'configs' / task.config).read_text(encoding='utf-8'))[:16]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return '-'
    return f'{statistics.mean(values):.1f}' + (f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else '')


def seeds_of(entry: Dict[str, Any]) -> List[str]:
    """Seeds with all trainings of a task."""
    return [seed for seed, runs in sorted(entry['seeds'].items()) if set(entry['trainings']) <= set(runs)]


def render(results: Dict[str, Any]) -> str:
    """The tables, of the seeds that are whole."""
    lines = []
    for entry in results['tasks'].values():
        seeds = seeds_of(entry)
        if not seeds:
            continue
        sets = entry['steps']
        lines += [f'### {entry["title"]}', '',
                  f'{entry["metric"]}, {len(seeds)} seed{"s" if len(seeds) > 1 else ""} ({", ".join(seeds)})'
                  + (', mean and standard deviation' if len(seeds) > 1 else '')
                  + f'; {entry["iters"]} iterations each. Old: {", ".join(sets[0]["new"])} ({sets[0]["images"][0]} '
                  f'training images). New: {", ".join(sets[1]["new"])} ({sets[1]["images"][0]}).', '',
                  '| training | old | new | all |', '|---|---|---|---|']
        for name in entry['trainings']:
            cells = [spread([entry['seeds'][seed][name][part] for seed in seeds if part in entry['seeds'][seed][name]])
                     for part in PARTS]
            if name == OLD:  # it knows no other classes
                cells[2] = '-'
            lines.append(f'| {name} | {" | ".join(cells)} |')
        lines.append('')
    known = results['versions']
    lines += [f'`{results["command"]}`; ' + ', '.join(f'{name} {version}' for name, version in known.items())
              + f'; {results["threads"]} CPU thread{"s" if results["threads"] > 1 else ""}.']
    return '\n'.join(lines)


def write_page(results: Dict[str, Any], page: Path) -> None:
    """Put the tables into the page, between their marks."""
    text = page.read_text(encoding='utf-8')
    if BEGIN not in text or END not in text:
        raise SystemExit(f'growing: {page} lacks the marks {BEGIN} and {END}')
    head, _, rest = text.partition(BEGIN)
    page.write_text(f'{head}{BEGIN}\n\n{render(results)}\n\n{END}{rest.partition(END)[2]}', encoding='utf-8')


# ---------------------------------------------------------------------------------------------------------------------
# command line


def run_all(tasks: Sequence[Task], args: argparse.Namespace) -> Dict[str, Any]:
    """Every training of every seed that the results lack."""
    import torch

    torch.set_num_threads(args.threads)
    warnings.filterwarnings('ignore')
    register_metric()
    results = load(args.results)
    command = f'python tools/studies/growing.py --data-root PATH --seeds {args.seeds}' + (
        f' --threads {args.threads}' if args.threads != 1 else '') + (f' --iters {args.iters}' if args.iters else '')
    made = machine.provenance(command, os.cpu_count() or 1, args.threads)
    results.update(made, versions=dict(python=made['python'], **made['versions']), threads=args.threads)
    entries = results.setdefault('tasks', {})
    plan: List[Tuple[int, Task]] = [(seed, task) for seed in range(args.seeds) for task in tasks]
    steps = {}
    for task in tasks:
        host = 'mmseg' if task.occurring else 'mmdet'
        data = engine.find_data(args.data_root, task.folder, host, f'--task {task.key}')
        steps[task.key] = split_data(task, data, args.work_dir / task.key)
    for seed, task in plan:
        iters = args.iters or task.iters
        entry = entries.setdefault(task.key, {})
        entry.update(title=task.title, metric=task.metric, iters=iters, trainings=task.names, steps=[
            dict(name=step.name, new=step.new, images=step.images, labels=step.labels) for step in steps[task.key]])
        runs = entry.setdefault('seeds', {}).setdefault(str(seed), {})
        for name in task.names:
            wanted = settings_hash(task, name, iters, steps[task.key])
            folder = args.work_dir / task.key
            run = folder / 'runs' / f'{name}_seed{seed}'
            weights = run / f'iter_{iters}.pth'
            if runs.get(name, {}).get('settings') == wanted and (name != OLD or weights.exists()
                                                                 or set(task.names) <= set(runs)):
                continue
            shutil.rmtree(run, ignore_errors=True)
            cfg = config_of(task, name, seed, folder, run, iters)
            seconds = train(cfg)
            runs[name] = dict(scores(task, cfg, weights, run, steps[task.key][0].new), settings=wanted,
                              seconds=round(seconds, 1))
            save(args.results, results, task.key)
            print(f'[growing] {task.key}, seed {seed}, {name}: ' + ', '.join(
                f'{part} {runs[name][part]:.1f}' for part in PARTS if part in runs[name]) + f' ({seconds:.0f} s)',
                flush=True)
    return {**results, 'tasks': load(args.results).get('tasks', entries)}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-root', type=Path, help='folder of the data sets (or KD_MM_DATA)')
    parser.add_argument('--task', choices=[task.key for task in TASKS], help='one of them; default: both')
    parser.add_argument('--seeds', type=int, default=3, help='default 3')
    parser.add_argument('--iters', type=int, help='of every training, to try the study; default: as set there')
    parser.add_argument('--threads', type=int, default=1, help='of the processor; default 1')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'growing')
    parser.add_argument('--results', type=Path, default=RESULTS, help='default docs/growing.json')
    parser.add_argument('--page', type=Path, default=PAGE, help='default docs/growing.md')
    parser.add_argument('--render', action='store_true', help='write the tables from the results, train nothing')
    args = parser.parse_args(argv)
    for name in ('seeds', 'threads', 'iters'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f'--{name} needs at least 1')
    args.work_dir = args.work_dir.resolve()
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    if args.render:
        results = load(args.results)
        if not results:
            print(f'growing: no results in {args.results}', file=sys.stderr)
            return 1
    else:
        try:
            results = run_all([task for task in TASKS if args.task in (None, task.key)], args)
        except engine.StageError as error:
            print(f'growing: {error}', file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print('\ngrowing: interrupted; the same command continues where it stopped', file=sys.stderr)
            return 130
    write_page(results, args.page)
    print(render(results))
    return 0


if __name__ == '__main__':
    sys.exit(main())
