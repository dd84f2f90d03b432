"""The data of ``tools/studies/benchmark.py``: its own small sets, or any COCO or Cityscapes root."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import stages as engine

#: Suffixes of the pictures in a Cityscapes root.
SUFFIXES = ('_leftImg8bit.png', '_leftImg8bit.jpg')
LABELS = '_gtFine_labelTrainIds.png'


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        root: its folder.
        name: of it, for keys and titles.
        images: number of training images.
        hash: of what the annotations say (COCO), or of the names and sizes of all files (Cityscapes).
        changes: of a config that is written for another set, so that it reads this one; nothing for its own.
        classes: names of the classes; None: those of the config.
    """
    root: Path
    name: str
    images: int
    hash: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    classes: Optional[Tuple[str, ...]] = None

    def options(self) -> List[str]:
        """For ``--cfg-options``."""
        return [] if self.changes else [f'data_root={self.root}/']

    def heads(self, model: Mapping[str, Any]) -> Dict[str, Any]:
        """What to change in a model so that every head has as many classes as this set."""
        return {} if self.classes is None else with_classes(model, len(self.classes))


def with_classes(value: Any, count: int) -> Dict[str, Any]:
    """The parts of a nested dict that name a number of classes, with this one.

    Example:
        >>> with_classes(dict(neck=dict(num_outs=3), bbox_head=dict(num_classes=80, in_channels=4)), 3)
        {'bbox_head': {'num_classes': 3}}
    """
    found: Dict[str, Any] = {}
    for key, part in value.items():
        if key == 'num_classes':
            found[key] = count
        elif hasattr(part, 'items'):
            inner = with_classes(part, count)
            if inner:
                found[key] = inner
    return found


def own_data(given: Optional[Path], settings: Any) -> Data:
    """The set that a pair of configs/benchmark names, below a folder of sets.

    Raises:
        StageError: it is not there, or lacks something.
    """
    root = engine.find_data(given, settings.data, settings.host, '--data-root')
    files = sorted(root.glob('annotations/instances_*.json'))
    return Data(root, settings.data, engine.count_images(root), hash_files(files) if files else hash_names(root))


def other_data(root: Path, host: str) -> Data:
    """Any root in the layout that a host's own configs read.

    Raises:
        StageError: nothing of that layout is there; the message says what was looked for.
    """
    root = root.resolve()
    return coco(root) if host == 'mmdet' else cityscapes(root)


def coco(root: Path) -> Data:
    """``annotations/*train*.json`` and ``*val*.json`` with the pictures in ``train2017/``, ``train/``, ..."""
    splits: Dict[str, Dict[str, Any]] = {}
    files = []
    classes: Tuple[str, ...] = ()
    images = 0
    for split in ('train', 'val'):
        found = [path for name in (f'instances_{split}.json', f'instances_{split}2017.json', f'*{split}*.json')
                 for path in sorted(root.glob(f'annotations/{name}'))]
        if not found:
            raise engine.StageError(f'--dataset {root}: no annotations/*{split}*.json, as a COCO root has it')
        content = json.loads(found[0].read_text())
        if not content.get('images') or not content.get('categories'):
            raise engine.StageError(f'--dataset {root}: {found[0].name} has no images or no categories; it is no COCO '
                                    'file of boxes')
        first = content['images'][0]['file_name']
        stem = found[0].stem.replace('instances_', '')
        places = (f'{stem}/', f'{split}/', f'{split}2017/', f'images/{stem}/', f'images/{split}/', 'images/', '')
        place = next((place for place in places if (root / place / first).is_file()), None)
        if place is None:
            raise engine.StageError(f'--dataset {root}: {first}, the first image of {found[0].name}, is in none of '
                                    f'{", ".join(place or "." for place in places)}')
        # In the order of the file, as mmdet numbers them.
        names = tuple(item['name'] for item in content['categories'])
        if split == 'train':
            classes, images = names, len(content['images'])
        elif names != classes:
            raise engine.StageError(f'--dataset {root}: the categories of training and validation differ')
        files.append(found[0])
        splits[split] = dict(data_root=f'{root}/', ann_file=f'annotations/{found[0].name}',
                             data_prefix=dict(img=place), metainfo=dict(classes=classes))
    evaluator = dict(ann_file=str(files[1]))
    changes = dict(train_dataloader=dict(dataset=splits['train']), val_dataloader=dict(dataset=splits['val']),
                   test_dataloader=dict(dataset=splits['val']), val_evaluator=evaluator, test_evaluator=evaluator)
    return Data(root, root.name, images, hash_files(files), changes, classes)


def cityscapes(root: Path) -> Data:
    """``leftImg8bit`` and ``gtFine``, with the 19 classes of Cityscapes."""
    splits = {}
    counts = {}
    for split in ('train', 'val'):
        suffix = next((suffix for suffix in SUFFIXES if any((root / 'leftImg8bit' / split).rglob(f'*{suffix}'))), None)
        if suffix is None or not any((root / 'gtFine' / split).rglob(f'*{LABELS}')):
            raise engine.StageError(f'--dataset {root}: no leftImg8bit/{split}/**/*{SUFFIXES[0]} (or .jpg) with '
                                    f'gtFine/{split}/**/*{LABELS}, as a Cityscapes root has them')
        counts[split] = sum(1 for _ in (root / 'leftImg8bit' / split).rglob(f'*{suffix}'))
        splits[split] = dict(dataset=dict(
            data_root=f'{root}/', img_suffix=suffix, seg_map_suffix=LABELS,
            data_prefix=dict(img_path=f'leftImg8bit/{split}', seg_map_path=f'gtFine/{split}')))
    changes = dict(train_dataloader=splits['train'], val_dataloader=splits['val'], test_dataloader=splits['val'])
    return Data(root, root.name, counts['train'], hash_names(root), changes)


def hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def hash_names(root: Path) -> str:
    """Of a Cityscapes root: names and sizes of the pictures and their labels."""
    digest = hashlib.sha256()
    for folder in ('leftImg8bit', 'gtFine'):
        for path in sorted((root / folder).rglob('*.*')):
            if path.parent.parent.name in ('train', 'val') or path.parent.name in ('train', 'val'):
                digest.update(f'{path.relative_to(root).as_posix()}:{path.stat().st_size}\n'.encode())
    return digest.hexdigest()
