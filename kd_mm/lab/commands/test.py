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
from typing import Any, Dict, Optional, Sequence

from mmengine.config import Config

from kd_mm.hosts.checkpoint import allow_mmengine_checkpoints, load, state_dict_of
from kd_mm.hosts.table import DETECTION, host_of_config
from kd_mm.lab.commands import REFUSALS, fail
from kd_mm.lab.commands.train import (
    add_shared_arguments,
    build_runner,
    check_data,
    check_folder,
    end_processes,
    init_cpu_processes,
    load_config,
    prepare_args,
    set_ranks,
)
from kd_mm.lab.configs import type_name


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
    found = host_of_config(cfg)
    if found is not None and found.host.no_tta and 'tta_model' not in cfg:
        fail(f'--tta: {found.host.no_tta}. Test without it, or give tta_model and tta_pipeline in the config')
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
        if type_name(evaluator) == 'IoUMetric':
            # mmseg makes the folder on the first process alone, and the others may be there sooner.
            os.makedirs(folder, exist_ok=True)
            evaluator.update(output_dir=folder, keep_results=True)


def read_weights(path: str) -> Dict[str, Any]:
    """The weights of a checkpoint; the host reads it once more, and leaves out in silence what does not fit."""
    try:
        return state_dict_of(load(path))
    except REFUSALS as error:
        fail(error)


def check_weights(model: Any, state: Dict[str, Any], path: str) -> None:
    """Refuse weights that are those of another model, and say which of its own a model does not get."""
    model = getattr(model, 'module', model)  # of several processes, or of test-time augmentation
    model = getattr(model, 'module', model)
    own = {key: value for key, value in model.state_dict().items() if not key.endswith('num_batches_tracked')}
    # The model itself converts older names.
    fitting = {key: value for key, value in state.items() if key not in own or own[key].shape == value.shape}
    missing = set(model.load_state_dict(fitting, strict=False).missing_keys)
    lacking = [key for key in own if key in missing]
    if own and len(lacking) == len(own):
        fail(f'none of the {len(own)} weights of the {type(model).__name__} of this config is in {path}: random ones '
             'would be scored. Give a checkpoint of this config')
    if lacking:
        print(f'kd_mm: {len(lacking)} of {len(own)} weights of this config are NOT in {path} and stay as they were '
              f'built, random as a rule: {", ".join(lacking[:5])}{", ..." if len(lacking) > 5 else ""}')


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args)
    if '://' not in args.checkpoint and not osp.isfile(args.checkpoint):
        fail(f'no such checkpoint: {args.checkpoint} (looked at {osp.abspath(args.checkpoint)})')
    state = read_weights(args.checkpoint)
    check_folder(cfg.work_dir)
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
    check_weights(runner.model, state, args.checkpoint)
    if args.out and detector:
        from mmdet.evaluation import DumpDetResults
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    runner.test()
    end_processes()
