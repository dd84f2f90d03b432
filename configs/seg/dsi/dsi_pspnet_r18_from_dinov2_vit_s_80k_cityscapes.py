# DSI: a DINOv2 teaches the last stage of the backbone. Card: README.md in this folder.
_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher=dict(type='timm', name='vit_small_patch14_dinov2'),
        # Nothing is downloaded: put the file there, or name yours.
        teacher_ckpt='checkpoints/dinov2_vits14_pretrain.pth',
        losses=dict(loss_dsi=dict(
            type='DSILoss', student_at='backbone', teacher_at='@backbone', levels=dict(student=[3], teacher=[0]),
            adapter=dict(type='ConvAdapter', always=True), loss_weight=5.0)))
]
