#!/usr/bin/env python3
"""Instances and panoptic segments from a segmentation set in Cityscapes layout.

    python tools/studies/instance_data.py PATH/camvid_cityscapes OUT --size 160 120

Each connected region of a countable class (person, rider, car) becomes one object with a box and a mask; the other
classes are stuff.  Objects of one class that touch or hide each other are one region, and one object that
something else cuts in two is two: these are instances by construction, not by an annotator.  Regions smaller than
``--least`` pixels of the original picture are no objects; in the panoptic maps they are left unlabelled.

Written to OUT, for the data sets of mmdet as they are (CocoDataset, CocoPanopticDataset):

    train/, val/                                  the images; links where their size stays
    annotations/instances_{train,val}.json        boxes and masks (run-length code) of the objects
    annotations/panoptic_{train,val}.json         objects and stuff
    panoptic_{train,val}/*.png                    id of the segment of each pixel: R + 256 G + 65536 B
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import cv2
import numpy as np
from pycocotools import mask as run_length

#: Cityscapes train id -> name.
THINGS = {11: 'person', 12: 'rider', 13: 'car'}
STUFF = {0: 'road', 1: 'sidewalk', 2: 'building', 4: 'fence', 5: 'pole', 7: 'traffic sign', 8: 'vegetation', 10: 'sky'}
#: Category ids of COCO, things first; the position is the label.
CATEGORIES = {name: index for index, name in enumerate([*THINGS.values(), *STUFF.values()], 1)}
#: Pixels of the smallest object.
LEAST = 300
Size = Tuple[int, int]
#: What a finished folder was made with, so that another one is made anew.
STAMP = 'made.json'


def regions(labels: np.ndarray, least: int = LEAST) -> Iterator[Tuple[str, bool, np.ndarray]]:
    """Name, whether it is an object, and mask (H, W) of each segment of a label map.

    Args:
        labels: (H, W) of train ids, 255 for none.
        least: pixels of the smallest object.

    Example:
        >>> labels = np.zeros((4, 6), np.uint8)
        >>> labels[1:3, 0:2] = labels[1:3, 3:5] = 13
        >>> [(name, thing, int(mask.sum())) for name, thing, mask in regions(labels, least=2)]
        [('car', True, 4), ('car', True, 4), ('road', False, 16)]
    """
    for train_id, name in THINGS.items():
        count, parts = cv2.connectedComponents((labels == train_id).astype(np.uint8), connectivity=8)
        for number in range(1, count):
            mask = parts == number
            if mask.sum() >= least:
                yield name, True, mask
    for train_id, name in STUFF.items():
        mask = labels == train_id
        if mask.any():
            yield name, False, mask


def box_of(mask: np.ndarray) -> List[int]:
    """x, y, width, height of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def pairs(root: Path, split: str) -> List[Tuple[Path, Path]]:
    """Image and label map of every picture of a split.

    Raises:
        FileNotFoundError: there are none, or a label map is missing.
    """
    found = []
    for image in sorted((root / 'leftImg8bit' / split).rglob('*_leftImg8bit.*')):
        labels = Path(str(image).replace('leftImg8bit', 'gtFine')).with_name(
            image.name.split('_leftImg8bit')[0] + '_gtFine_labelTrainIds.png')
        if not labels.exists():
            raise FileNotFoundError(f'{image} has no label map {labels}')
        found.append((image, labels))
    if not found:
        raise FileNotFoundError(f'no pictures *_leftImg8bit.* below {root / "leftImg8bit" / split}')
    return found


def resized(segments: List[Tuple[str, bool, np.ndarray]], size: Optional[Size]) -> List[Tuple[str, bool, np.ndarray]]:
    """The segments at another size (width, height), by nearest neighbour; those of which nothing is left are gone."""
    if size is None:
        return segments
    small = [(name, thing, cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0)
             for name, thing, mask in segments]
    return [segment for segment in small if segment[2].any()]


def convert(root: Path, out: Path, split: str, least: int = LEAST, size: Optional[Size] = None) -> Dict[str, int]:
    """Write one split; how many objects of each class there are."""
    categories = [dict(id=index, name=name, isthing=int(name in THINGS.values())) for name, index in CATEGORIES.items()]
    images: List[Dict[str, Any]] = []
    instances: List[Dict[str, Any]] = []
    panoptic: List[Dict[str, Any]] = []
    counts = dict.fromkeys(THINGS.values(), 0)
    for folder in (out / split, out / f'panoptic_{split}', out / 'annotations'):
        folder.mkdir(parents=True, exist_ok=True)
    for number, (image, label_file) in enumerate(pairs(root, split)):
        stem = image.name.split('_leftImg8bit')[0]
        name = f'{stem}{image.suffix}'
        labels: Any = cv2.imread(str(label_file), cv2.IMREAD_UNCHANGED)
        picture(image, out / split / name, size)
        width, height = size or labels.shape[::-1]
        ids, segments = np.zeros((height, width), np.uint32), []
        for segment, (kind, thing, mask) in enumerate(resized(list(regions(labels, least)), size), 1):
            ids[mask] = segment
            entry = dict(id=segment, category_id=CATEGORIES[kind], bbox=box_of(mask), area=int(mask.sum()), iscrowd=0)
            segments.append(entry)
            if thing:
                counts[kind] += 1
                code = run_length.encode(np.asfortranarray(mask.astype(np.uint8)))
                instances.append(dict(entry, id=len(instances) + 1, image_id=number, segmentation=dict(
                    size=code['size'], counts=code['counts'].decode())))
        colours = np.stack([ids >> 16 & 255, ids >> 8 & 255, ids & 255], axis=-1).astype(np.uint8)  # BGR for OpenCV
        cv2.imwrite(str(out / f'panoptic_{split}' / f'{stem}.png'), colours)
        images.append(dict(id=number, file_name=name, height=height, width=width))
        panoptic.append(dict(image_id=number, file_name=f'{stem}.png', segments_info=segments))
    for kind, annotations in (('instances', instances), ('panoptic', panoptic)):
        named = [entry for entry in categories if kind == 'panoptic' or entry['isthing']]
        (out / 'annotations' / f'{kind}_{split}.json').write_text(json.dumps(dict(
            info={}, licenses=[], images=images, annotations=annotations, categories=named)))
    return counts


def picture(source: Path, target: Path, size: Optional[Size]) -> None:
    """A link to a picture, a copy of it where the file system has no links, or itself at another size."""
    if target.exists() or target.is_symlink():
        target.unlink()
    if size is not None:
        pixels: Any = cv2.imread(str(source))
        cv2.imwrite(str(target), cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
        return
    try:
        target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()))
    except OSError:
        target.write_bytes(source.read_bytes())


def make(root: Path, out: Path, least: int = LEAST, size: Optional[Size] = None) -> Dict[str, Dict[str, int]]:
    """Both splits, unless ``out`` has them already; the number of objects of each class by split.

    Raises:
        FileNotFoundError: ``root`` has no such data set.
    """
    wanted = dict(source=str(root.resolve()), least=least, size=size and list(size), categories=CATEGORIES)
    stamp = out / STAMP
    made = json.loads(stamp.read_text()) if stamp.exists() else {}
    if made.get('from') != wanted:
        objects = {split: convert(root, out, split, least, size) for split in ('train', 'val')}
        made = {'from': wanted, 'objects': objects}
        stamp.write_text(json.dumps(made, indent=1))
    return made['objects']


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', type=Path, help='folder with leftImg8bit and gtFine')
    parser.add_argument('out', type=Path, help='folder to write to')
    parser.add_argument('--least', type=int, default=LEAST, help=f'pixels of the smallest object (default {LEAST})')
    parser.add_argument('--size', type=int, nargs=2, metavar=('W', 'H'), help='resize everything (default: as it is)')
    args = parser.parse_args(argv)
    try:
        objects = make(args.root, args.out, args.least, args.size and (args.size[0], args.size[1]))
    except FileNotFoundError as error:
        print(f'instance_data: {error}', file=sys.stderr)
        return 1
    for split, counts in objects.items():
        print(f'{split}: ' + ', '.join(f'{count} {name}' for name, count in counts.items()))
    return 0


if __name__ == '__main__':
    sys.exit(main())
