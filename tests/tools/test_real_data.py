"""Real images, where they are: COCO with the stock data set config, trained with the hook and evaluated."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_mm.hosts.checkpoint import load_file

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get('KD_MM_DATA') or ROOT.parent / 'shared' / 'data')

CONFIG = """
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
model = dict(
    backbone=dict(depth=18, base_channels=8, stem_channels=8, init_cfg=None, frozen_stages=-1),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1))
custom_hooks = [dict(
    type='kd_mm.DistillHook',
    teacher=dict(default_scope='mmdet', model={{_base_.model}}),
    teacher_ckpt='random',
    losses=dict(loss_fgd=dict(type='FGDLoss', at='neck')))]
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2, val_interval=10)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=2))
"""


@pytest.mark.skipif(not (DATA / 'coco128').is_dir(), reason=f'no coco128 in {DATA} (set KD_MM_DATA)')
def test_stock_coco_config_on_real_images(tmp_path):
    """Only ``data_root`` changes, and the picture size so that a CPU can do it; the teacher is the stock R50."""
    config = tmp_path / 'coco128.py'
    config.write_text(CONFIG)
    root = [f'data_root={DATA / "coco128"}/']

    def run(tool, *arguments):
        command = [sys.executable, str(ROOT / 'tools' / tool), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    trained = run('train.py', config, '--work-dir', tmp_path / 'work', '--cfg-options', *root,
                  'train_dataloader.dataset.pipeline.2.scale=(160,128)', 'train_dataloader.num_workers=0',
                  'train_dataloader.persistent_workers=False')
    assert trained.returncode == 0, trained.stderr[-3000:]
    checkpoint = tmp_path / 'work' / 'iter_2.pth'
    assert 'kd_mm' in load_file(str(checkpoint))
    # A model that has learned nothing scores every box below the stock threshold.
    tested = run('test.py', config, checkpoint, '--work-dir', tmp_path / 'eval', '--cfg-options', *root,
                 'model.test_cfg.score_thr=0.0', 'test_dataloader.dataset.indices=16',
                 'test_dataloader.dataset.pipeline.1.scale=(160,128)', 'test_dataloader.num_workers=0',
                 'test_dataloader.persistent_workers=False')
    assert tested.returncode == 0, tested.stderr[-3000:]
    assert 'coco/bbox_mAP' in tested.stdout + tested.stderr
