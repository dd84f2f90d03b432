# Memory distillation: the encoder's output of a DETR, inside the objects. Card: README.md in this folder.
_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmdetection/v3.0/deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco/deformable-detr-refine-twostage_r50_16xb2-50e_coco_20221021_184714-acc8a5ff.pth',  # noqa: E501
        losses=dict(
            loss_memory=dict(
                type='FitNetLoss', at='@memory', region=dict(type='GTBoxRegion'), loss_weight=2.0)))
]
