# Teacher of segformer_cwd.py: SegFormer B2.
_base_ = 'mmseg::segformer/segformer_mit-b2_8xb1-160k_cityscapes-1024x1024.py'

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(backbone=dict(init_cfg=None), decode_head=dict(norm_cfg=norm_cfg))
