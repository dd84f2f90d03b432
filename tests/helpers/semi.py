"""The stock SoftTeacher, narrow, on the test's COCO data: half of the images with labels, half without."""

import copy
from typing import Any

from mmengine.config import Config
from stock import finish
from two_stage import two_stage_config

from kd_mm.hosts.zoo import zoo_config


def soft_teacher(root: Any, work_dir: Any, steps: int = 2, kind: str = 'SoftTeacher') -> Config:
    """Two images with labels and two without in each step; every object that its own teacher predicts is taken.

    Args:
        root: of the data.
        work_dir: of the Runner.
        steps: of the training.
        kind: ``'SoftTeacher'``, or ``'SemiBaseDetector'`` itself.
    """
    name = 'soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py'
    cfg = Config.fromfile(str(zoo_config(f'mmdet::soft_teacher/{name}')))
    detector = two_stage_config('faster', classes=2).model
    detector.data_preprocessor = copy.deepcopy(cfg.model.detector.data_preprocessor)
    detector.test_cfg.rcnn.score_thr = 0.0
    cfg.model.detector = detector
    cfg.model.type = kind
    cfg.model.semi_train_cfg.update(pseudo_label_initial_score_thr=0.0, rpn_pseudo_thr=0.0, cls_pseudo_thr=0.0,
                                    reg_pseudo_thr=1.0, jitter_times=2)
    sets = cfg.train_dataloader.dataset.datasets
    for dataset in sets:
        dataset.update(data_root=str(root), ann_file='annotations.json', data_prefix=dict(img='images/'),
                       metainfo=dict(classes=('square', 'disc')), filter_cfg=None)

    def small(pipeline: Any) -> None:
        """Pictures of 64 pixels, and the same pictures in every run."""
        for step in list(pipeline):
            for name in ('sup', 'unsup_teacher', 'unsup_student'):
                if name in step and isinstance(step[name], list):
                    small(step[name])
            if step['type'] == 'RandomResize':
                step.update(scale=[(64, 64), (64, 64)])
            elif step['type'] in ('RandAugment', 'RandomOrder', 'RandomErasing'):
                pipeline.remove(step)

    for dataset in sets:
        small(dataset.pipeline)
    cfg.train_dataloader.update(batch_size=4, num_workers=0, persistent_workers=False)
    cfg.train_dataloader.sampler.update(batch_size=4, source_ratio=[1, 1])
    return finish(cfg, work_dir, steps, False)
