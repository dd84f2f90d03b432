"""Fine-grained feature imitation."""

from golden.vector import Vector, recipe
from kd_mm.regions.fine_grained import FineGrainedRegion


@recipe('fgfi')
def fgfi(v: Vector) -> None:
    region = FineGrainedRegion(strides=[v.number('feat_stride')], scales=v.number('anchor_scales'),
                               ratios=v.number('anchor_ratios'), iou_factor=v.number('iou_factor'), legacy=True)
    outcome = v.run(dict(type='FGFILoss', loss_weight=v.number('imitation_loss_weight')), region=region,
                    adapter=dict(type='ConvAdapter', kernel_size=3, always=True, relu=True),
                    rules=[(r'adapter_(\d)_(\w+)', r'adapter.convs.\1.\2')])
    v.check('mask_0', region(tuple(outcome.teacher), v.batch())[0][:, 0])
