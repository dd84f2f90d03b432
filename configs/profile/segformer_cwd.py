# A transformer for segmentation: SegFormer B0 from B2, CWD on the logits.
#   python tools/measure.py configs/profile/segformer_cwd.py --batch 2 --shape 192 256
_base_ = 'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py'

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(backbone=dict(init_cfg=None), decode_head=dict(norm_cfg=norm_cfg))

custom_hooks = [dict(
    type='kd_mm.DistillHook',
    teacher='{{ fileDirname }}/segformer_cwd_teacher.py',
    teacher_ckpt='random',
    losses=dict(loss_cwd=dict(type='CWDLoss', at='decode_head.conv_seg', tau=1.0, loss_weight=5.0)))]
