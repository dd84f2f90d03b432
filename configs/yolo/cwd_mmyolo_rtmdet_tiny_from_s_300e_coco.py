# MMYOLO's own recipe for RTMDet: CWD between normalised neck features, switched off when mosaic stops. Its numbers, not
# run by us: README.md in this folder. It needs MMYOLO.
_base_ = 'mmyolo::rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py'

# The base stops mosaic and mix-up 20 epochs before the end, and distillation stops there too.  Schedules count
# iterations: 117266 training images with boxes, 8 GPUs x 32 images, makes 459 an epoch.  With other data or another
# batch size change this number; the log shows the iterations of an epoch.
iterations_without_mosaic = 20 * 459

custom_hooks = [
    # A list replaces the list of the base: without this line its EMA and its pipeline switch would be lost.
    *_base_.custom_hooks,
    dict(
        type='kd_mm.DistillHook',
        teacher='mmyolo::rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco.py',
        teacher_ckpt='https://download.openmmlab.com/mmyolo/v0/rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco/rtmdet_s_syncbn_fast_8xb32-300e_coco_20221230_182329-0a8c901a.pth',  # noqa: E501
        losses=dict(
            loss_cwd=dict(
                type='CWDLoss',
                # The convolutions themselves, before their batch norm and activation.
                at='neck.out_layers.*.conv',
                adapter=dict(type='NormAdapter', bias=False),
                tau=1.0,
                loss_weight=dict(type='WindowSchedule', windows=[(0, -iterations_without_mosaic)], value=1.0))))
]
