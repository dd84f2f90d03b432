# DSI: a DINOv2 teaches the last stage of the backbone. Card: README.md in this folder.
_base_ = 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'

custom_hooks = [
    # A list replaces the list of the base: without this line its EMA and its pipeline switch would be lost.
    *_base_.custom_hooks,
    dict(
        type='kd_mm.DistillHook',
        teacher=dict(type='timm', name='vit_small_patch14_dinov2'),
        # Nothing is downloaded: put the file there, or name yours.
        teacher_ckpt='checkpoints/dinov2_vits14_pretrain.pth',
        # Patches of 14 pixels of a picture of half the size have about the cells of the last stage.
        view=dict(scale=0.5),
        losses=dict(loss_dsi=dict(
            type='DSILoss', student_at='backbone', teacher_at='@backbone', levels=dict(student=[2], teacher=[0]),
            adapter=dict(type='ConvAdapter', always=True), loss_weight=5.0)))
]
