# DSI: a DINOv2 teaches the last stage of the backbone. Card: README.md in this folder.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher=dict(type='timm', name='vit_small_patch14_dinov2'),
        # Nothing is downloaded: put the file there, or name yours.
        teacher_ckpt='checkpoints/dinov2_vits14_pretrain.pth',
        # Patches of 14 pixels of a picture of half the size have about the cells of the last stage.
        view=dict(scale=0.5),
        losses=dict(loss_dsi=dict(
            type='DSILoss', student_at='backbone', teacher_at='@backbone', levels=dict(student=[3], teacher=[0]),
            adapter=dict(type='ConvAdapter', always=True), loss_weight=5.0)))
]
