"""Real images, where they are: COCO with the stock data set config, trained with the hook and evaluated."""

import json
import os
from pathlib import Path

import pytest
from stock import tool

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
def test_stock_coco_config_on_real_images(tmp_path, monkeypatch):
    """Only ``data_root`` changes, and the size and number of pictures so that a CPU can do it; the teacher is the
    stock R50."""
    monkeypatch.setenv('LOCAL_RANK', '0')  # the tools set it for their process, which here is that of all tests
    config = tmp_path / 'coco128.py'
    config.write_text(CONFIG)

    def run(name, *arguments):
        options = [f'data_root={DATA / "coco128"}/', f'visualizer.name={tmp_path.name}_{name}',
                   # A model that has learned nothing scores every box below the stock threshold.
                   'model.test_cfg.score_thr=0.0', 'train_dataloader.dataset.pipeline.2.scale=(160,128)']
        for loader in ('train', 'val', 'test'):
            options += [f'{loader}_dataloader.num_workers=0', f'{loader}_dataloader.persistent_workers=False']
        for loader in ('val', 'test'):  # the training ends with an evaluation too
            options += [f'{loader}_dataloader.dataset.indices=8',
                        f'{loader}_dataloader.dataset.pipeline.1.scale=(160,128)']
        work_dir = tmp_path / name
        tool(name).main([*map(str, arguments), '--work-dir', str(work_dir), '--cfg-options', *options])
        return [json.loads(line) for path in work_dir.glob('*/**/*.json') for line in path.read_text().splitlines()]

    trained = run('train', config)
    checkpoint = tmp_path / 'train' / 'iter_2.pth'
    assert 'kd_mm' in load_file(str(checkpoint)) and any('coco/bbox_mAP' in line for line in trained)
    assert any('coco/bbox_mAP' in line for line in run('test', config, checkpoint))
