"""Evaluate a checkpoint with a config of a host (mmdet, mmseg, ...).

    kd-mm test CONFIG work_dirs/.../epoch_24.pth
    kd-mm test CONFIG CHECKPOINT --show-dir pictures --out predictions.pkl

A distilled checkpoint is the plain student: the config with the distillation hook and the plain one give the same
numbers, and no teacher is built.
"""

import argparse
import copy
import os
import os.path as osp
from typing import Any, Optional, Sequence

from mmengine.config import Config

from kd_mm.hosts.checkpoint import allow_mmengine_checkpoints
from kd_mm.hosts.table import DETECTION, host_of_config
from kd_mm.lab.commands import fail
from kd_mm.lab.commands.train import (
    add_shared_arguments,
    build_runner,
    check_data,
    end_processes,
    init_cpu_processes,
    load_config,
    prepare_args,
    set_ranks,
)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, or kd_mm::NAME for one that we ship')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--work-dir', help='folder for the log and the metrics. Default: as in tools/train.py')
    parser.add_argument('--out', help='keep the predictions: a .pkl file (mmdet) or a folder for label maps (mmseg)')
    parser.add_argument('--show-dir', help='draw the predictions into this folder (mmdet: below WORK_DIR/timestamp, '
                        'unless the path is absolute)')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation, as the config or the host has it')
    add_shared_arguments(parser)
    return prepare_args(parser.parse_args(argv))


def detects(cfg: Config) -> bool:
    """Whether a config is that of a detector; a segmentor's otherwise."""
    found = host_of_config(cfg)
    return found is not None and found.host.task == DETECTION


def draw(cfg: Config, show_dir: str) -> None:
    hook: Any = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        fail('--show-dir needs default_hooks.visualization in the config')
    hook['draw'] = True
    if detects(cfg):
        hook['test_out_dir'] = show_dir
    else:
        cfg.visualizer['save_dir'] = show_dir
        hook['interval'] = 1  # mmseg draws every 50th batch otherwise


def use_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation; for a detector without a recipe of its own: flips."""
    if not detects(cfg) and not ('tta_model' in cfg and 'tta_pipeline' in cfg):
        fail('--tta needs tta_model and tta_pipeline in the config; the base configs of mmseg have them')
    sets = [cfg.test_dataloader.dataset]
    for dataset in sets:  # it grows: wrappers hold one or several
        sets += [dataset['dataset']] if 'dataset' in dataset else dataset.get('datasets', [])
    sets = [dataset for dataset in sets if 'pipeline' in dataset]
    if 'tta_pipeline' in cfg:
        pipeline = cfg.tta_pipeline
    else:
        pipeline = copy.deepcopy(sets[-1].pipeline)
        meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
        pipeline[-1] = dict(type='TestTimeAug', transforms=[
            [dict(type='mmdet.RandomFlip', prob=1.), dict(type='mmdet.RandomFlip', prob=0.)],
            [dict(type='mmdet.PackDetInputs', meta_keys=meta)]])
    # Its class is registered with mmengine: every scope finds it, and under the prefix of mmdet none does.
    tta_model = copy.deepcopy(cfg.get('tta_model') or dict(
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))
    for dataset in sets:
        dataset.pipeline = copy.deepcopy(pipeline)
    cfg.model = dict(tta_model, module=cfg.model)


def keep_seg_predictions(cfg: Config, folder: str) -> None:
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    for evaluator in evaluators:
        if evaluator.get('type') == 'IoUMetric':
            # mmseg makes the folder on the first process alone, and the others may be there sooner.
            os.makedirs(folder, exist_ok=True)
            evaluator.update(output_dir=folder, keep_results=True)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args)
    if '://' not in args.checkpoint and not osp.isfile(args.checkpoint):
        fail(f'no such checkpoint: {args.checkpoint} (looked at {osp.abspath(args.checkpoint)})')
    detector = detects(cfg)
    if args.out and detector and not args.out.endswith(('.pkl', '.pickle')):
        fail(f'--out {args.out}: predictions of a detector go into a .pkl file')
    check_data(cfg, ('test', ))
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show_dir:
        draw(cfg, args.show_dir)
    if args.tta:
        use_tta(cfg)
    if args.out and not detector:
        keep_seg_predictions(cfg, args.out)
    allow_mmengine_checkpoints()
    set_ranks(cfg.launcher)
    init_cpu_processes(cfg)
    runner = build_runner(cfg)
    if args.out and detector:
        from mmdet.evaluation import DumpDetResults
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    runner.test()
    end_processes()
