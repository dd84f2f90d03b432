"""MMDetection 3.x, as published and as onedl-mmdetection."""

from kd_mm.hosts.growing import SCORES, Branch
from kd_mm.hosts.meaning import BOXES, DISTRIBUTIONS, OBJECTNESS, QUALITY
from kd_mm.hosts.picks import queries, yolo_v3
from kd_mm.hosts.synthetic import det_sample
from kd_mm.hosts.table import DETECTION, Host, register

register(Host(
    'mmdet', DETECTION, versions=('3.0', '4.0'), sample=det_sample, pack='PackDetInputs',
    logits={
        'ATSSHead': (('atss_cls', ), None),
        'AnchorFreeHead': (('conv_cls', ), None),
        'AnchorHead': (('conv_cls', ), None),
        'CenterNetHead': (('heatmap_head', ), None),
        'CornerHead': (('tl_heat.*', 'br_heat.*'), None),
        'DDODHead': (('atss_cls', ), None),
        'GARetinaHead': (('retina_cls', ), None),
        'GFLHead': (('gfl_cls', ), None),
        'RepPointsHead': (('reppoints_cls_out', ), None),
        'RetinaHead': (('retina_cls', ), None),
        'RetinaSepBNHead': (('retina_cls', ), None),
        'RPNHead': (('rpn_cls', ), None),
        'RTMDetHead': (('rtm_cls', ), None),
        'RTMDetInsSepBNHead': (('rtm_cls.*', ), None),
        'RTMDetSepBNHead': (('rtm_cls.*', ), None),
        'SABLRetinaHead': (('retina_cls', ), None),
        'SOLOHead': (('conv_cls', ), None),
        'SSDHead': (('cls_convs.*', ), None),
        'TOODHead': (('tood_cls', ), None),
        'VFNetHead': (('vfnet_cls', ), None),
        'YOLOFHead': (('cls_score', ), None),
        'YOLOV3Head': (('convs_pred.*', ), yolo_v3),
        'YOLOXHead': (('multi_level_conv_cls.*', ), None),
        'MaskFormerHead': (('', ), queries),
    },
    # Queries, points, something else than classes.
    no_logits=('ATSSVLFusionHead', 'EmbeddingRPNHead'),
    class_rows={
        'AutoAssignHead': {'center_prior': Branch()},
        'BBoxHead': {'fc_cls': SCORES, 'fc_reg': Branch(block=4, unless='reg_class_agnostic')},
        'CoarseMaskHead': {'fc_logits': Branch(block=0, unless='class_agnostic')},
        'ConditionalDETRHead': {'fc_cls': SCORES},
        'DETRHead': {'fc_cls': SCORES},
        'DeformableDETRHead': {'cls_branches.*': SCORES},
        'FCNMaskHead': {'conv_logits': Branch(unless='class_agnostic')},
        'GlobalContextHead': {'fc': Branch()},
        'MaskFormerHead': {'cls_embed': SCORES},
        'MaskIoUHead': {'fc_mask_iou': Branch()},
        'YOLOV3Head': {'convs_pred.*': Branch(before=5, anchored=True)},
    },
    fixed={
        'ATSSVLFusionHead': 'its classes are given as text and have no rows',
        'GroundingDINOHead': 'its classes are given as text and have no rows',
        'MaskPointHead': 'it takes the scores of the classes as inputs',
    },
    branches={
        'atss_centerness': QUALITY, 'atss_iou': QUALITY, 'atss_reg': BOXES, 'bbox_pred': BOXES,
        'conv_centerness': QUALITY, 'conv_reg': BOXES, 'gfl_reg': DISTRIBUTIONS, 'multi_level_conv_obj': OBJECTNESS,
        'multi_level_conv_reg': BOXES, 'object_pred': OBJECTNESS, 'offset_head': BOXES, 'reg_convs': BOXES,
        'retina_reg': BOXES, 'rpn_reg': BOXES, 'rtm_obj': OBJECTNESS, 'rtm_reg': BOXES, 'tood_reg': BOXES,
        'vfnet_reg': BOXES, 'vfnet_reg_refine': BOXES, 'wh_head': BOXES},
    only_of={'reg_convs': ('SSDHead', )},  # towers in all others
))
