"""MMSegmentation 1.x, as published and as onedl-mmsegmentation."""

from kd_mm.hosts.growing import SCORES, Branch
from kd_mm.hosts.picks import last, main_branch, queries
from kd_mm.hosts.synthetic import seg_sample
from kd_mm.hosts.table import SEGMENTATION, Host, register

register(Host(
    'mmseg', SEGMENTATION, index='mmsegmentation', versions=('1.0', '2.0'), needs=('ftfy', 'regex'), sample=seg_sample,
    pack='PackSegInputs',
    logits={
        'BaseDecodeHead': (('conv_seg', ), None),
        'IterativeDecodeHead': (('', ), last),
        'MaskFormerHead': (('', ), queries),
        'SegmenterMaskTransformerHead': (('', ), None),
    },
    # Points of a refinement, queries, numbers that are no classes.
    no_logits=('PointHead', 'SideAdapterCLIPHead', 'VPDDepthHead'),
    class_rows={
        'EncHead': {'se_layer': Branch()},
        'MaskFormerHead': {'cls_embed': SCORES},
    },
    fixed={
        'IterativeDecodeHead': 'each of its stages makes kernels of the classes from those of the stage before',
        'PointHead': 'it takes the scores of the classes as inputs',
        'SegmenterMaskTransformerHead': 'it normalises over the classes',
        'SideAdapterCLIPHead': 'its classes are given as text and have no rows',
    },
    backbones={'DDRNet': last, 'PIDNet': main_branch},
))
