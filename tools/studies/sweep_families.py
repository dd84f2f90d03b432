"""The families that ``tools/studies/sweep.py`` tries: a folder of configs each, and which config of it."""

from importlib import import_module, metadata
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Tuple

from kd_mm.hosts import packages
from kd_mm.hosts.table import hosts
from kd_mm.hosts.zoo import package_folder

#: Scope -> entry in the table.
HOSTS = {host.scope: host for host in hosts()}

#: Folders that are no family of detectors or segmentors, or need what is not installed.
LEFT_OUT: Dict[str, Dict[str, str]] = {
    'mmdet': {
        **dict.fromkeys(('bytetrack', 'deepsort', 'masktrack_rcnn', 'mask2former_vis', 'ocsort', 'qdtrack', 'sort',
                         'strongsort', 'reid'), 'tracking, video or re-identification'),
        **dict.fromkeys(('glip', 'grounding_dino', 'mm_grounding_dino'),
                        'needs a language model (download of BERT, package transformers)'),
        'common': 'parts for other configs, no model',
        'soft_teacher': 'two detectors in one, distilled in its branches: tests/engine/test_branches.py',
    },
    'mmrotate': {'h2rbox_v2': 'it turns and flips each image inside of its loss and learns from all three; a teacher '
                              'sees the one that the batch has'},
    'mmyolo': {'deploy': 'for mmdeploy, no model', 'razor': 'needs mmrazor: searched and pruned models'},
}
#: The config of a folder that stands for it, where the smallest is not what the family is known for.
CHOSEN = {
    'mmdet/cascade_rpn': 'cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py',
    'mmdet/guided_anchoring': 'ga-retinanet_r50-caffe_fpn_1x_coco.py',
    'mmdet/yolo': 'yolov3_mobilenetv2_8xb24-320-300e_coco.py',
    'mmdet/rtmdet': 'rtmdet_tiny_8xb32-300e_coco.py',
    'mmdet/pvt': 'retinanet_pvtv2-b0_fpn_1x_coco.py',
    'mmseg/mask2former': 'mask2former_r50_8xb2-90k_cityscapes-512x1024.py',
    'mmyolo/ppyoloe': 'ppyoloe_plus_s_fast_8xb8-80e_coco.py',
    'mmyolo/rtmdet': 'rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py',  # the smallest one is frozen below its neck
    'mmyolo/yolov5': 'yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py',
    'mmyolo/yolov6': 'yolov6_n_syncbn_fast_8xb32-300e_coco.py',
    'mmyolo/yolov7': 'yolov7_tiny_syncbn_fast_8x16b-300e_coco.py',
    'mmyolo/yolov8': 'yolov8_n_syncbn_fast_8xb16-500e_coco.py',
    'mmyolo/yolox': 'yolox_nano_fast_8xb8-300e_coco.py',
}
#: Further configs: heads that share a folder with another family.
ALSO = {
    'mmdet/rtmdet': ('rtmdet-ins_tiny_8xb32-300e_coco.py', ),
    'mmdet/guided_anchoring': ('ga-rpn_r50-caffe_fpn_1x_coco.py', ),
    'mmdet/swin': ('retinanet_swin-t-p4-w7_fpn_1x_coco.py', ),
    'mmdet/solo': ('decoupled-solo-light_r50_fpn_3x_coco.py', ),
    'mmdet/pisa': ('ssd300_pisa_coco.py', 'retinanet-r50_fpn_pisa_1x_coco.py'),
    'mmdet/yolo': ('yolov3_d53_8xb8-320-273e_coco.py', ),
    'mmdet/mask2former': ('mask2former_r50_8xb2-lsj-50e_coco-panoptic.py', ),
    'mmseg/pspnet': ('pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', ),
    'mmyolo/yolov6': ('yolov6_v3_m_syncbn_fast_8xb32-300e_coco.py', ),
    'mmyolo/rtmdet': ('rtmdet-ins_s_syncbn_fast_8xb32-300e_coco.py', ),
    'mmyolo/yolov7': ('yolov7_w-p6_syncbn_fast_8x16b-300e_coco.py', 'yolov7_l_syncbn_fast_8x16b-300e_coco.py'),
    'mmseg/swin': ('swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py', ),
}
#: Marks of size in file names, small first.
SIZES = ('nano', 'r18', 'mobilenet', 'mv2', 'm-v2', 'b0', 'tiny', 'swin-t', '-t_', 'regnetx-400mf', 'stdc1', 'w18',
         'pidnet-s', '_s_', 'small', 'swin-s', 'r34', 'regnetx-800mf', 'r50', 'hv2p-w32', 'd53', '_l_', 's50', 'h48',
         'r101', 'x101', 'vit-b', 'base', 'large', 'huge')



def import_hosts() -> None:
    """The installed hosts; once, before the first fork."""
    for name, host in HOSTS.items():
        if not packages.installed(name):
            print(f'{name} is not installed')
            continue
        if not all(map(packages.installed, host.needs)):  # torchvision, which is in a folder of its own here
            import_module('foundation').provide()
        import_module(f'{name}.models')


def installed() -> List[str]:
    """Hosts whose configs are here."""
    return [host for host in HOSTS if package_folder(host) is not None]


def folders(host: str) -> List[Path]:
    root = package_folder(host)
    if root is None:
        return []
    return sorted(path for path in (root / 'configs').iterdir() if path.is_dir() and not path.name.startswith('_'))


def size_of(path: Path) -> Tuple[int, int, str]:
    marks = [index for index, mark in enumerate(SIZES) if mark in path.name]
    return (min(marks, default=len(SIZES)), len(path.name), path.name)


def families() -> List[Tuple[str, List[Path], Optional[str]]]:
    """(name, candidate configs from the best on, reason to leave it out) of every folder of the hosts."""
    found = []
    for host in HOSTS:
        for folder in folders(host):
            name = f'{host}/{folder.name}'
            configs = sorted(folder.glob('*.py'), key=size_of)
            chosen = [folder / CHOSEN[name]] if name in CHOSEN and (folder / CHOSEN[name]).exists() else []
            reason = LEFT_OUT.get(host, {}).get(folder.name) or (None if configs else 'no config')
            found.append((name, [*chosen, *[path for path in configs if path not in chosen]], reason))
            for extra in ALSO.get(name, ()):
                if (folder / extra).exists() and folder / extra != found[-1][1][0]:
                    found.append((f'{name}/{extra.removesuffix(".py")}', [folder / extra], reason))
    return found


def in_order(known: Iterable[str]) -> List[str]:
    """The families of ``known`` by host: those of the installed hosts that are still there, and all that is known of
    hosts that are not installed here, in another environment."""
    known = list(known)
    away = [name for name in known if not any(name.startswith(f'{host}/') for host in installed())]
    names = sorted([*(name for name, *_ in families()), *away], key=lambda name: list(HOSTS).index(name.split('/')[0]))
    return [name for name in names if name in known]


def versions() -> Dict[str, str]:
    """Of what is installed here."""
    found = {}
    for name in ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmyolo', 'mmrotate'):
        for candidate in (name, f'onedl-{name}', f'{name}-open', f'{name}-dev'):
            try:
                found[name] = metadata.version(candidate).split('+')[0]
            except metadata.PackageNotFoundError:
                continue
    return found
