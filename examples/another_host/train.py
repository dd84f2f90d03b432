#!/usr/bin/env python3
"""Distillation in a package that kd_mm has no entry for: MMPose 1.3.2.

    pip install mmpose==1.3.2                                     # beside kd_mm; nothing else needs it
    python examples/another_host/train.py                         # a trial training on a CPU
    python examples/another_host/train.py --without-entry         # what is said without the entry

Three files: ``mmpose_entry.py`` is the entry, ``config.py`` the config that names it, and this one runs the config in
mmengine's Runner on eight pictures that it draws: 17 discs each, annotated as COCO does.  Student and teacher have
random weights; what is shown is that the parts fit (the losses fall, the checkpoint is a plain one), not a gain.

The entry says no more than how a random sample looks, which the checks before the training need.  Losses on features
and on any module path work with that; ``'@logits'`` and losses on whole heads are refused, since nothing is known of
MMPose's heads.

The wheel of xtcocotools that MMPose imports was built for numpy 1.  Where it does not load, pycocotools, which has the
same interface for what is used here, stands in its place.
"""

import argparse
import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner, load_checkpoint

HERE = Path(__file__).resolve().parent
MODULES = ('', '.coco', '.mask', '.cocoeval')
POINTS, HEIGHT, WIDTH = 17, 128, 96


def stand_in():
    """Put pycocotools in the place of an xtcocotools that does not load."""
    try:
        importlib.import_module('xtcocotools.mask')
    except (ImportError, ValueError) as error:  # numpy says by a ValueError that its arrays have another size
        print(f'pycocotools stands in for xtcocotools ({error})')
        for name in MODULES:
            sys.modules[f'xtcocotools{name}'] = importlib.import_module(f'pycocotools{name}')


def draw(root, count, seed):
    """Pictures of 17 discs in 17 colours, and where they are, as a COCO file of keypoints."""
    random = np.random.default_rng(seed)
    colours = random.integers(64, 256, (POINTS, 3))
    images, annotations = [], []
    (root / 'images').mkdir(parents=True)
    for index in range(count):
        points = np.stack([random.integers(8, WIDTH - 8, POINTS), random.integers(8, HEIGHT - 8, POINTS)], axis=1)
        picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        for point, colour in zip(points.tolist(), colours.tolist()):
            cv2.circle(picture, point, 4, colour, -1)
        cv2.imwrite(str(root / 'images' / f'{index}.png'), picture)
        images.append(dict(id=index, file_name=f'{index}.png', width=WIDTH, height=HEIGHT))
        annotations.append(dict(
            id=index, image_id=index, category_id=1, bbox=[0, 0, WIDTH, HEIGHT], area=WIDTH * HEIGHT, iscrowd=0,
            num_keypoints=POINTS, keypoints=[number for x, y in points.tolist() for number in (x, y, 2)]))
    category = dict(id=1, name='person', keypoints=[str(point) for point in range(POINTS)], skeleton=[])
    (root / 'keypoints.json').write_text(json.dumps(dict(
        images=images, annotations=annotations, categories=[category])))


class Keep(Hook):
    """The losses of every step."""

    def __init__(self):
        self.steps = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps.append({name: float(value) for name, value in outputs.items()})


def settings(root, args):
    """The config for the drawn pictures."""
    text = (HERE / 'config.py').read_text()
    if args.without_entry:
        text = '\n'.join(line for line in text.splitlines() if not line.startswith('custom_imports'))
    cfg = Config.fromstring(text, '.py')
    cfg.train_dataloader.update(batch_size=4, num_workers=0, persistent_workers=False)
    cfg.train_dataloader.dataset.update(
        data_root=str(root), ann_file='keypoints.json', data_prefix=dict(img='images/'))
    for part in ('val', 'test'):
        for key in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{part}_{key}'] = None
    cfg.train_cfg = dict(by_epoch=True, max_epochs=args.epochs)
    cfg.param_scheduler = None  # it warms up for 500 steps
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=args.epochs)
    for name in ('visualization', 'badcase'):  # they look at validation
        cfg.default_hooks.pop(name)
    # Of the log only what goes wrong, and not how each layer begins.
    cfg.update(work_dir=str(root / 'work'), randomness=dict(seed=args.seed), log_level='WARNING')
    return cfg


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=2, help='of two steps each. Default: 2')
    parser.add_argument('--seed', type=int, default=0, help='of the pictures and the weights. Default: 0')
    parser.add_argument('--without-entry', action='store_true', help='leave out custom_imports')
    args = parser.parse_args(argv)
    if importlib.util.find_spec('mmpose') is None:
        raise SystemExit('this example needs the package mmpose, which is not installed: pip install mmpose==1.3.2')
    sys.path.insert(0, str(HERE))  # mmpose_entry
    stand_in()
    MMLogger.get_instance('mmengine', log_level='WARNING')
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw(root, 8, args.seed)
        cfg, keep = settings(root, args), Keep()
        runner = Runner.from_cfg(cfg)
        runner.register_hook(keep)
        try:
            runner.train()
        except ValueError as error:
            if not args.without_entry:
                raise
            print(f'refused before the first step: {error}')
            return []
        checkpoint = torch.load(root / 'work' / f'epoch_{args.epochs}.pth', map_location='cpu', weights_only=False)
        load_checkpoint(runner.model, str(root / 'work' / f'epoch_{args.epochs}.pth'), strict=True)
    for name in keep.steps[0]:
        if name.startswith('loss_'):
            values = [step[name] for step in keep.steps]
            print(f'{name}: {values[0]:.4g} to {values[-1]:.4g} in {len(values)} steps')
    print(f'the checkpoint has {len(checkpoint["state_dict"])} weights, all of them of the plain model')
    return keep.steps


if __name__ == '__main__':
    main()
