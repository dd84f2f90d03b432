"""Small real data sets in the layouts that users have, written by a few lines each.

Every picture has squares on noise; the last one has none. Each writer gives a :class:`Layout`: the host's own data set,
its evaluator and its class names, as a config writes them.
"""

import csv
import inspect
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np

#: (h, w) of the pictures, wide and high ones by turns.
SIZES = ((48, 64), (64, 48))


@dataclass
class Layout:
    """What a config says of a data set.

    Attributes:
        dataset: config of the data set; its pipeline is given later.
        classes: names of its classes, as its ``metainfo`` has them.
        evaluator: config of the host's evaluator; None where the host has none that works.
        metric: the number that says it in one.
        meta_keys: more entries of a test sample that the evaluator reads.
    """

    dataset: Dict[str, Any]
    classes: Tuple[str, ...]
    evaluator: Optional[Dict[str, Any]] = None
    metric: str = ''
    meta_keys: Sequence[str] = field(default_factory=tuple)


@dataclass
class Scene:
    """One picture: (x1, y1, x2, y2, kind) of each object."""

    name: str
    picture: np.ndarray
    objects: List[Tuple[int, int, int, int, int]]

    @property
    def size(self) -> Tuple[int, int]:
        return self.picture.shape[:2]


def scenes(images: int = 4, kinds: int = 2, seed: int = 0, channels: int = 3, depth: type = np.uint8) -> List[Scene]:
    """Pictures (h, w, channels) of squares, two in each but the last."""
    draw = np.random.default_rng(seed)
    top = 255 if depth is np.uint8 else 40000
    found = []
    for index in range(images):
        height, width = SIZES[index % 2]
        picture = draw.integers(0, top // 3, (height, width, channels)).astype(depth)
        objects = []
        for number in range(0 if index == images - 1 else 2):
            side = int(draw.integers(14, 22))
            x, y = (int(draw.integers(0, edge - side)) for edge in (width, height))
            kind = (index + number) % kinds
            picture[y:y + side, x:x + side] = top * (kind + 2) // (kinds + 2)
            objects.append((x, y, x + side, y + side, kind))
        found.append(Scene(f'{index:06d}', picture, objects))
    return found


def write_picture(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture[..., 0] if picture.shape[-1] == 1 else picture)


# ---------------------------------------------------------------------- detection


def coco_content(found: Sequence[Scene], names: Sequence[str], suffix: str = '.png') -> Dict[str, Any]:
    """COCO's form. Besides the objects of the first picture there are a crowd (its mask is run lengths), one that is to
    be ignored, one without area, and one of a category that no class has."""
    content: Dict[str, Any] = dict(
        info={}, licenses=[], images=[], annotations=[],
        categories=[dict(id=10 * number + 3, name=name, isthing=1) for number, name in enumerate((*names, 'unknown'))])

    def add(image: int, box: Sequence[int], category: int, **extra: Any) -> None:
        x1, y1, x2, y2 = box
        content['annotations'].append({
            'id': len(content['annotations']) + 1, 'image_id': image, 'category_id': 10 * category + 3,
            'bbox': [x1, y1, x2 - x1, y2 - y1], 'area': (x2 - x1) * (y2 - y1), 'iscrowd': 0,
            'segmentation': [[x1, y1, x2, y1, x2, y2, x1, y2]], **extra})

    for number, scene in enumerate(found):
        height, width = scene.size
        content['images'].append(dict(id=100 + number, file_name=f'{scene.name}{suffix}', height=height, width=width))
        for *box, kind in scene.objects:
            add(100 + number, box, kind)
    height, width = found[0].size
    runs = dict(size=[height, width], counts=[0, height * 20, height * (width - 20)])
    add(100, (0, 0, 20, height), 0, iscrowd=1, segmentation=runs)
    add(100, (1, 1, 9, 9), 1, ignore=True)
    add(100, (5, 5, 5, 9), 0)
    add(100, (30, 5, 40, 25), len(names))
    return content


def coco(root: Path, kind: str = 'CocoDataset', names: Sequence[str] = ('square', 'disc'), full: bool = False,
         channels: int = 3, depth: type = np.uint8, suffix: str = '.png', **extra: Any) -> Layout:
    """CocoDataset, and those that inherit from it.

    Args:
        names: of the two categories.
        full: whether the data set keeps all classes of its own, among them these.
        channels, depth, suffix: of the pictures.
    """
    found = scenes(channels=channels, depth=depth)
    for scene in found:
        write_picture(root / 'images' / f'{scene.name}{suffix}', scene.picture)
    (root / 'annotations.json').write_text(json.dumps(coco_content(found, names, suffix)))
    dataset = dict(type=kind, data_root=str(root), ann_file='annotations.json', data_prefix=dict(img='images/'),
                   **extra)
    if not full:
        dataset['metainfo'] = dict(classes=tuple(names))
    evaluator = dict(type='CocoMetric', ann_file=str(root / 'annotations.json'), metric='bbox')
    return Layout(dataset, tuple(names), evaluator, 'coco/bbox_mAP')


def _xml(scene: Scene, names: Sequence[str], folder: str, difficult: bool) -> str:
    objects = ''.join(
        f'<object><name>{names[kind]}</name><difficult>{int(difficult and not number)}</difficult><bndbox>'
        f'<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>'
        for number, (x1, y1, x2, y2, kind) in enumerate(scene.objects))
    height, width = scene.size
    return (f'<annotation><folder>{folder}</folder><size><width>{width}</width><height>{height}</height></size>'
            f'{objects}</annotation>')


def voc(root: Path, year: str = 'VOC2007', kind: str = 'VOCDataset', seed: int = 0) -> Layout:
    """``VOCdevkit/VOC2007`` with the names of a split; the first object of the first picture is difficult."""
    names = ('aeroplane', 'bicycle')
    found = scenes(seed=seed)
    for folder in ('Annotations', 'ImageSets/Main'):
        (root / year / folder).mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(found):
        write_picture(root / year / 'JPEGImages' / f'{scene.name}.jpg', scene.picture)
        (root / year / 'Annotations' / f'{scene.name}.xml').write_text(_xml(scene, names, year, not number))
    (root / year / 'ImageSets' / 'Main' / 'trainval.txt').write_text('\n'.join(scene.name for scene in found))
    dataset = dict(type=kind, data_root=str(root), ann_file=f'{year}/ImageSets/Main/trainval.txt',
                   data_prefix=dict(sub_data_root=f'{year}/'))
    if kind == 'XMLDataset':
        dataset['metainfo'] = dict(classes=names)
    else:
        from mmdet.datasets import VOCDataset
        names = VOCDataset.METAINFO['classes']
    return Layout(dataset, tuple(names), dict(type='VOCMetric', metric='mAP'), 'pascal_voc/mAP')


def wider_face(root: Path) -> Layout:
    found = scenes(kinds=1)
    (root / 'WIDER_train' / 'Annotations').mkdir(parents=True)
    for scene in found:
        write_picture(root / 'WIDER_train' / '0--Parade' / f'{scene.name}.jpg', scene.picture)
        (root / 'WIDER_train' / 'Annotations' / f'{scene.name}.xml').write_text(
            _xml(scene, ('face', ), '0--Parade', False))
    (root / 'train.txt').write_text('\n'.join(scene.name for scene in found))
    return Layout(dict(type='WIDERFaceDataset', data_root=str(root), ann_file='train.txt',
                       data_prefix=dict(img='WIDER_train')), ('face', ),
                  dict(type='VOCMetric', metric='mAP', eval_mode='11points'), 'pascal_voc/mAP')


def crowdhuman(root: Path) -> Layout:
    """Lines of JSON; the second object of a picture is a crowd, tagged ``mask``, and in one it is to be ignored.

    The host's evaluator takes no picture without objects.
    """
    lines = []
    for index, scene in enumerate(scenes(5, kinds=1)[:-1]):
        write_picture(root / 'Images' / f'{scene.name}.jpg', scene.picture)
        boxes = []
        for number, (x1, y1, x2, y2, _) in enumerate(scene.objects):
            box = [x1, y1, x2 - x1, y2 - y1]
            boxes.append(dict(tag='mask' if number and not index else 'person', fbox=box, vbox=box, hbox=box,
                              head_attr={}, extra=dict(ignore=1) if number and index == 1 else {}))
        lines.append(json.dumps(dict(ID=scene.name, gtboxes=boxes)))
    (root / 'annotation_train.odgt').write_text('\n'.join(lines))
    return Layout(dict(type='CrowdHumanDataset', data_root=str(root), ann_file='annotation_train.odgt',
                       data_prefix=dict(img='Images/')), ('person', ),
                  dict(type='CrowdHumanMetric', ann_file=str(root / 'annotation_train.odgt'), metric=['AP', 'MR']),
                  'crowd_human/mAP')


def open_images(root: Path, challenge: bool = False) -> Layout:
    """A table of boxes as fractions, names and sizes in files of their own, and a tree of classes."""
    found = scenes()[:-1]  # a picture without boxes has no line
    (root / 'annotations').mkdir(parents=True)
    rows, text = [], []
    for scene in found:
        height, width = scene.size
        write_picture(root / 'train' / f'{scene.name}.jpg', scene.picture)
        text += [f'{scene.name}.jpg', '0', str(len(scene.objects))]
        for x1, y1, x2, y2, kind in scene.objects:
            box = [x1 / width, x2 / width, y1 / height, y2 / height]
            rows.append([scene.name, 'xclick', f'/m/{kind}', 1, *box, 0, 0, 0, 0, 0])
            text.append(f'{kind + 1} {box[0]} {box[2]} {box[1]} {box[3]} 0')
    names = ('Animal', 'Cat')
    files = {name: root / 'annotations' / name for name in ('boxes.csv', 'boxes.txt', 'names.csv', 'tree.json',
                                                            'tree.np', 'sizes.pkl')}
    with open(files['boxes.csv'], 'w', newline='') as stream:
        csv.writer(stream).writerows([['ImageID'] + ['x'] * 12, *rows])
    files['boxes.txt'].write_text('\n'.join(text))
    with open(files['names.csv'], 'w', newline='') as stream:
        csv.writer(stream).writerows([f'/m/{kind}', name, kind + 1] for kind, name in enumerate(names))
    files['tree.json'].write_text(json.dumps(dict(LabelName='/m/all', Subcategory=[
        dict(LabelName='/m/0', Subcategory=[dict(LabelName='/m/1')])])))
    with open(files['tree.np'], 'wb') as stream:
        np.save(stream, np.eye(len(names) + 1))
    files['sizes.pkl'].write_bytes(pickle.dumps(
        [dict(filename=f'{scene.name}.jpg', ori_shape=(*scene.size, 3)) for scene in found]))
    kind = 'OpenImagesChallengeDataset' if challenge else 'OpenImagesDataset'
    dataset = dict(
        type=kind, data_root=str(root), ann_file=f'annotations/boxes.{"txt" if challenge else "csv"}',
        data_prefix=dict(img='train/'), label_file='annotations/names.csv', meta_file='annotations/sizes.pkl',
        hierarchy_file=f'annotations/tree.{"np" if challenge else "json"}')
    # The metric of mmdet 3.3.0 asks for ``is_group_of``, which the challenge's data set calls otherwise.
    evaluator = None if challenge else dict(
        type='OpenImagesMetric', iou_thrs=0.5, ioa_thrs=0.5, use_group_of=True, get_supercategory=True)
    return Layout(dataset, names, evaluator, '' if challenge else 'openimages/AP50', ('instances', ))


def lvis(root: Path) -> Layout:
    """LVIS v1: files named by their URL, and for each picture the categories that are not in it."""
    from mmdet.datasets import LVISV1Dataset
    names = LVISV1Dataset.METAINFO['classes']
    found = scenes()
    content = coco_content(found, names[:2], '.png')
    content['categories'] = [dict(id=number + 1, name=name, frequency='f', image_count=1, instance_count=1)
                             for number, name in enumerate(names)]
    content['annotations'] = [
        dict(annotation, category_id=(annotation['category_id'] - 3) // 10 + 1)
        for annotation in content['annotations'] if not annotation['iscrowd'] and annotation['area']
        and annotation['category_id'] < 20 and not annotation.get('ignore')]
    for image, scene in zip(content['images'], found):
        write_picture(root / 'train2017' / f'{scene.name}.png', scene.picture)
        image.update(coco_url=f'http://images.cocodataset.org/train2017/{scene.name}.png',
                     neg_category_ids=[1, 2], not_exhaustive_category_ids=[])
    (root / 'lvis.json').write_text(json.dumps(content))
    dataset = dict(type='LVISV1Dataset', data_root=str(root), ann_file='lvis.json', data_prefix=dict(img=''))
    evaluator = dict(type='LVISMetric', ann_file=str(root / 'lvis.json'), metric='bbox')
    return Layout(dataset, tuple(names), evaluator, 'lvis/bbox_AP')


#: Writers of detection sets that a Runner trains on.
DETECTION: Dict[str, Callable[[Path], Layout]] = dict(
    coco=coco, voc=voc, xml=lambda root: voc(root, 'VOC2012', 'XMLDataset'), wider_face=wider_face,
    crowdhuman=crowdhuman, open_images=open_images, open_images_challenge=lambda root: open_images(root, True))

#: Sets that are CocoDataset with other classes.
COCO_KIN = ('ADE20KInstanceDataset', 'CityscapesDataset', 'DeepFashionDataset', 'Objects365V1Dataset',
            'Objects365V2Dataset', 'iSAIDDataset')


# ---------------------------------------------------------------------- segmentation


def label_map(scene: Scene, classes: int, zero_is_nothing: bool, ignored: int = 255) -> np.ndarray:
    """(h, w) labels: the background is the first class, objects are others; two rows are ignored."""
    labels = np.zeros(scene.size, np.uint8)
    for x1, y1, x2, y2, kind in scene.objects:
        labels[y1:y2, x1:x2] = 1 + kind % max(classes - 1, 1) if classes > 1 else 0
    if zero_is_nothing:
        labels = labels + 1
        labels[:2] = 0
    else:
        labels[:2] = ignored
    return labels


def segmentation(root: Path, kind: str = 'BaseSegDataset', classes: Sequence[str] = ('ground', 'square'),
                 split: str = 'train', listed: bool = False, folders: Tuple[str, str] = ('img_dir', 'ann_dir'),
                 channels: int = 3, depth: type = np.uint8, seed: int = 0, binary: bool = False,
                 **extra: Any) -> Layout:
    """``img_dir/train`` and ``ann_dir/train`` with the suffixes of the host's data set.

    Args:
        classes: for ``BaseSegDataset``, which has none of its own.
        listed: whether a text file names the pictures.
        folders: of pictures and label maps.
        channels, depth: of the pictures.
        binary: whether the labels are 0 and 1 alone, without anything that is ignored.
    """
    import mmseg.datasets
    host = getattr(mmseg.datasets, kind)
    defaults = {name: parameter.default for name, parameter in inspect.signature(host.__init__).parameters.items()}

    def option(name: str, value: Any) -> Any:
        return extra.get(name, defaults.get(name, value))

    own = host.METAINFO.get('classes')
    names = tuple(own or classes)
    suffixes = option('img_suffix', '.png'), option('seg_map_suffix', '.png')
    found = scenes(seed=seed, channels=channels, depth=depth)
    for scene in found:
        labels = label_map(scene, len(names), option('reduce_zero_label', False))
        write_picture(root / folders[0] / split / f'{scene.name}{suffixes[0]}', scene.picture)
        write_picture(root / folders[1] / split / f'{scene.name}{suffixes[1]}',
                      (np.where(labels == 255, 0, labels) if binary else labels)[..., None])
    dataset = dict(type=kind, data_root=str(root), data_prefix=dict(
        img_path=f'{folders[0]}/{split}', seg_map_path=f'{folders[1]}/{split}'), **extra)
    if own is None:
        dataset['metainfo'] = dict(classes=names, palette=[[number, 0, 0] for number in range(len(names))])
    if listed or defaults.get('ann_file') is inspect.Parameter.empty:
        (root / f'{split}.txt').write_text('\n'.join(scene.name for scene in found))
        dataset['ann_file'] = f'{split}.txt'
    return Layout(dataset, names, dict(type='IoUMetric', iou_metrics=['mIoU']), 'mIoU')
