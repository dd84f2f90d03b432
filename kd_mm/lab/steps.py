"""Split a data set into the steps of a training whose classes grow: labels of each step, and a config for each.

In the training data of a step only its new classes are labelled; in its validation data all classes so far are.  What
is written is plain: annotation files in COCO's form, or label maps with lists of names, and configs over the one given.
"""

import copy
import json
import os
import os.path as osp
import pprint
import textwrap
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

import numpy as np
from mmengine.config import Config
from PIL import Image

from kd_mm.hosts.models import as_names, class_counts, inner_dataset
from kd_mm.hosts.table import SEGMENTATION, host_of_config
from kd_mm.lab.data import SECTIONS, EmptyData, open_set
from kd_mm.lab.models import scope_of
from kd_mm.ops.classes import is_background

#: Which training images a step has: all with an object of a new class, or those of them without one of a later step.
PROTOCOLS = ('overlapped', 'disjoint')
#: What becomes of pixels whose class is not labelled in a step.
UNSEEN = ('background', 'ignore')
IGNORE = 255


@dataclass
class Step:
    """One step, or (``index`` 0) the training on everything.

    Attributes:
        index: from 1.
        new: classes that are labelled in its training data.
        classes: all that its model knows, a background first, then in the order in which they are learned.
        images: of its training data, and how many of them there are.
        labels: boxes, or images with pixels, of each new class.
        files: what its data sets get, by phase.
    """

    index: int
    new: List[str]
    classes: List[str]
    images: Tuple[int, int] = (0, 0)
    labels: Dict[str, int] = field(default_factory=dict)
    files: Dict[str, Dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f'step{self.index}' if self.index else 'joint'


def parse_groups(words: Sequence[str], known: Sequence[str]) -> List[List[str]]:
    """The classes of each step.

    Args:
        words: names with commas, one word a step; or one word of numbers, ``'8+3'``, in the order of ``known``.
        known: classes of the data, without a background.

    Raises:
        ValueError: a class is not known or named twice, the numbers do not come out, or there is one step only.

    Example:
        >>> parse_groups(['RBC,WBC', 'Platelets'], ['RBC', 'WBC', 'Platelets'])
        [['RBC', 'WBC'], ['Platelets']]
        >>> parse_groups(['1+2'], ['RBC', 'WBC', 'Platelets'])
        [['RBC'], ['WBC', 'Platelets']]
    """
    listed = f'The data has {len(known)} classes: {", ".join(known)}'
    if len(words) == 1 and all(part.strip().isdigit() for part in words[0].split('+')):
        counts = [int(part) for part in words[0].split('+')]
        if sum(counts) != len(known) or 0 in counts:
            raise ValueError(f'{words[0]}: {sum(counts)} classes in {len(counts)} steps. {listed}. Give numbers from 1 '
                             'that add up to that, or names, such as A,B C; with --occurring only those classes count '
                             'that the training labels have')
        names = iter(known)
        groups = [[next(names) for _ in range(count)] for count in counts]
    else:
        groups = [[name.strip() for name in word.split(',') if name.strip()] for word in words]
    flat = [name for group in groups for name in group]
    unknown = [name for name in flat if name not in known]
    if unknown:
        raise ValueError(f'no such class: {", ".join(unknown)}. {listed}')
    twice = sorted({name for name in flat if flat.count(name) > 1})
    if twice:
        raise ValueError(f'{", ".join(twice)}: named twice; a class is learned in one step')
    if len(groups) < 2 or not all(groups):
        raise ValueError(f'{" ".join(words) or "no steps"}: give two steps or more, each with a class, such as '
                         f'{known[0]} {",".join(known[1:3])}. {listed}')
    return groups


def choose(present: Mapping[Any, Set[str]], groups: Sequence[Sequence[str]], index: int, protocol: str) -> List[Any]:
    """The training images of a step.

    Args:
        present: image -> classes in it.
        groups: classes of each step.
        index: of the step, from 0.
        protocol: ``'overlapped'``: images with a class of the step; ``'disjoint'``: and none of a later one, so that no
            image is in two steps.

    Example:
        >>> present = dict(a={'cat'}, b={'cat', 'dog'}, c={'dog'})
        >>> [choose(present, [['cat'], ['dog']], 0, protocol) for protocol in PROTOCOLS]
        [['a', 'b'], ['a']]
    """
    new = set(groups[index])
    later = {name for group in groups[index + 1:] for name in group} if protocol == 'disjoint' else set()
    return [image for image, names in present.items() if names & new and not names & later]


def split(cfg: Config, file: str, words: Sequence[str], out: str, protocol: str = 'overlapped',
          unseen: str = 'background', occurring: bool = False) -> List[Step]:
    """Write the data and the configs of every step, and of the joint training.

    Args:
        cfg: a config of :func:`kd_mm.lab.configs.read_config`.
        file: its path, the ``_base_`` of what is written.
        words: see :func:`parse_groups`.
        out: folder to write to.
        protocol: see :func:`choose`.
        unseen: segmentation: pixels of classes that a step does not label are ``'background'``, which becomes the first
            class if the data has none, or are left out (``'ignore'``).
        occurring: count only classes that the training labels have.

    Returns:
        The steps, and the joint training at the end.

    Raises:
        ValueError, FileNotFoundError: what cannot be split, and the mend.
    """
    host = host_of_config(cfg)
    segmentation = host is not None and host.host.task == SEGMENTATION
    work: Any = _Maps(cfg, unseen) if segmentation else _Boxes(cfg)
    known = work.known
    if occurring:
        there: Set[str] = set().union(*work.present('train', known).values())
        known = [name for name in known if name in there]
    groups = parse_groups(words, known)
    counts = _count_of(cfg, len(work.classes))
    count_overrides(cfg.model, counts, counts)  # raises before anything is written
    flat = [name for group in groups for name in group]
    present = work.present('train', flat)
    chosen = [choose(present, groups, index, protocol) for index in range(len(groups))]
    for index, group in enumerate(groups):
        if not chosen[index]:
            raise ValueError(f'step {index + 1} ({", ".join(group)}) has no training image: ' + (
                'none has a new class without one of a later step. Use --protocol overlapped, or another order'
                if choose(present, groups, index, 'overlapped') else 'no training label has one of these classes'))
    steps = []
    for index, group in enumerate(groups):
        seen = [name for part in groups[:index + 1] for name in part]
        step = Step(index + 1, list(group), [*work.first, *seen])
        _fill(step, work, chosen[index], present, out, seen)
        steps.append(step)
    joint = Step(0, flat, [*work.first, *flat])
    _fill(joint, work, [image for image, names in present.items() if names], present, out, flat)
    joint.files['val'] = steps[-1].files['val']
    steps.append(joint)
    for step in steps:
        text = config_text(cfg, file, step, work, counts, steps)
        with open(osp.join(out, f'{step.name}.py'), 'w', encoding='utf-8') as stream:
            stream.write(text)
    return steps


def _fill(step: Step, work: Any, chosen: Sequence[Any], present: Mapping[Any, Set[str]], out: str,
          seen: Sequence[str]) -> None:
    folder = osp.join(out, step.name)
    os.makedirs(folder, exist_ok=True)
    step.images = len(chosen), len(present)
    step.files['train'], step.labels = work.write('train', folder, step, chosen, step.new)
    if step.index:
        step.files['val'], _ = work.write('val', folder, step, None, seen)


# ---------------------------------------------------------------------------------------------------------------------
# data


def _section(cfg: Config, phase: str) -> Tuple[Any, int]:
    """The config of the innermost data set of a phase, and how many wrappers are around it."""
    dataset: Any = (cfg.get(f'{phase}_dataloader') or {}).get('dataset')
    depth = 0
    while hasattr(dataset, 'get') and inner_dataset(dataset) is not None:
        if 'datasets' in dataset:
            raise ValueError(f'{phase}_dataloader.dataset is made of several data sets ({dataset.get("type")}): split '
                             'each by itself, in a config with that one alone')
        dataset, depth = dataset['dataset'], depth + 1
    if not hasattr(dataset, 'get'):
        raise ValueError(f'the config has no {phase}_dataloader with a dataset')
    return dataset, depth


def _open(cfg: Config, phase: str, lazy: bool) -> Any:
    section, _ = _section(cfg, phase)
    with scope_of(cfg):
        try:
            return open_set(cfg, dict(section, pipeline=[], **(dict(lazy_init=True) if lazy else {})))
        except EmptyData as error:
            raise ValueError(f'{phase}_dataloader.dataset: {error}') from error
        except Exception as error:  # the registry and the readers of annotations raise anything
            raise ValueError(f'{phase}_dataloader.dataset cannot be opened: {type(error).__name__}: {error}. Look at '
                             f'it with kd-mm check {cfg.filename} --data 10') from error


class _Boxes:
    """A detection data set in COCO's form."""

    first: Sequence[str] = ()

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.content: Dict[str, Any] = {}
        for phase in ('train', 'val'):
            dataset = _open(cfg, phase, lazy=True)
            self.content[phase] = self._read(phase, str(getattr(dataset, 'ann_file', '')))
            if phase == 'train':
                self.classes = self.known = as_names(dataset.metainfo.get('classes') or ())
        lacking = [name for name in self.known
                   if name not in {entry['name'] for entry in self.content['train']['categories']}]
        if not self.known or lacking:
            raise ValueError('the classes of the config are not the categories of its training annotations'
                             + (f': {", ".join(lacking[:5])}' if lacking else '')
                             + '. Give them in metainfo=dict(classes=...)')

    @staticmethod
    def _read(phase: str, file: str) -> Dict[str, Any]:
        where = f'{phase}_dataloader.dataset: the annotation file {file!r}'
        if not osp.isfile(file):
            raise FileNotFoundError(f'{where} is not there (looked at {osp.abspath(file)})')
        try:
            with open(file, encoding='utf-8') as stream:
                content = json.load(stream)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON file: {error}. Only COCO's form can be split") from error
        missing = [name for name in SECTIONS if not isinstance(content, dict) or name not in content]
        entries = () if missing else content['annotations'][:1]
        if missing or any('category_id' not in entry or 'bbox' not in entry for entry in entries):
            raise ValueError(f"{where} is not in COCO's form for boxes"
                             + (f': it has no {", ".join(missing)}' if missing else ''))
        return dict(content)

    def _names(self, phase: str) -> Dict[int, str]:
        return {entry['id']: entry['name'] for entry in self.content[phase]['categories']}

    def present(self, phase: str, classes: Sequence[str]) -> Dict[Any, Set[str]]:
        """Image -> those of the classes that it has objects of, crowds not counted."""
        names = self._names(phase)
        found: Dict[Any, Set[str]] = {entry['id']: set() for entry in self.content[phase]['images']}
        for entry in self.content[phase]['annotations']:
            if not entry.get('iscrowd') and names.get(entry['category_id']) in classes:
                found.setdefault(entry['image_id'], set()).add(names[entry['category_id']])
        return found

    def write(self, phase: str, folder: str, step: Step, images: Optional[Sequence[Any]],
              labelled: Sequence[str]) -> Tuple[Dict[str, Any], Dict[str, int]]:
        """An annotation file with these images (all of them) and the boxes of these classes."""
        content, names = self.content[phase], self._names(phase)
        chosen = None if images is None else set(images)
        # The host numbers the labels in the order of the file, whatever the order of `classes`.
        entries = {entry['name']: entry for entry in content['categories']}
        lacking = [name for name in step.classes if name not in entries]
        if lacking:
            raise ValueError(f'the annotations of {phase}_dataloader have no category {", ".join(lacking)}')
        boxes = [entry for entry in content['annotations'] if names.get(entry['category_id']) in labelled
                 and (chosen is None or entry['image_id'] in chosen)]
        kept = dict(content, categories=[entries[name] for name in step.classes], annotations=boxes,
                    images=[entry for entry in content['images'] if chosen is None or entry['id'] in chosen])
        path = osp.abspath(osp.join(folder, f'{phase}.json'))
        with open(path, 'w', encoding='utf-8') as stream:
            json.dump(kept, stream)
        counts = {name: sum(names[entry['category_id']] == name for entry in boxes) for name in labelled}
        return dict(ann_file=path), counts

    def meta(self, step: Step) -> Dict[str, Any]:
        """What a data set of a step knows of its classes."""
        return dict(classes=tuple(step.classes))

    def dataset(self, step: Step, phase: str) -> Dict[str, Any]:
        """What the config of a data set of a step says otherwise."""
        return dict(step.files[phase])

    def evaluator(self, step: Step) -> Any:
        """The evaluator of a step, as far as it differs."""
        own: Any = self.cfg.get('val_evaluator')
        file = step.files['val']['ann_file']
        if isinstance(own, (list, tuple)):
            return [dict(entry, ann_file=file) if 'ann_file' in entry else dict(entry) for entry in own]
        return dict(ann_file=file) if hasattr(own, 'get') and own.get('ann_file') else None


class _Maps:
    """A segmentation data set whose labels are pictures, such as Cityscapes."""

    def __init__(self, cfg: Config, unseen: str):
        self.cfg, self.unseen = cfg, unseen
        self.sets = {phase: _open(cfg, phase, lazy=False) for phase in ('train', 'val')}
        meta = self.sets['train'].metainfo
        self.classes = as_names(meta.get('classes') or ())
        if not self.classes:
            raise ValueError('the training data have no class names: give metainfo=dict(classes=..., palette=...)')
        palette = meta.get('palette') or []
        self.palette = {name: list(color) for name, color in zip(self.classes, palette)}
        own = [name for name in self.classes[:1] if is_background(name)]
        #: classes that every step has: a background.
        self.first = own or (['background'] if unseen == 'background' else [])
        self.known = [name for name in self.classes if name not in self.first]
        self._seen: Dict[str, Dict[int, Set[str]]] = {}

    def _labels(self, phase: str, index: int) -> np.ndarray:
        """Class indices (H, W) of a sample, 255 for none, as the host would read them."""
        info = self.sets[phase].get_data_info(index)
        file = info.get('seg_map_path')
        if not file or not osp.isfile(file):
            raise FileNotFoundError(f'{phase}_dataloader.dataset, sample {index}: no label map {file}')
        with Image.open(file) as picture:
            labels = np.array(picture)
        if labels.ndim != 2 or labels.dtype != np.uint8:
            raise ValueError(f'{file} is no picture with one number of 8 bits a pixel')
        if info.get('reduce_zero_label'):
            labels = np.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1).astype(np.uint8)
        table = np.full(256, IGNORE, np.uint8)
        table[:len(self.classes)] = range(len(self.classes))
        for old, new in (info.get('label_map') or {}).items():
            table[old] = new if 0 <= new < len(self.classes) else IGNORE
        return table[labels]

    def present(self, phase: str, classes: Sequence[str]) -> Dict[int, Set[str]]:
        """Sample -> those of the classes that it has pixels of."""
        if phase not in self._seen:
            self._seen[phase] = {
                index: {self.classes[label] for label in np.unique(self._labels(phase, index)) if label != IGNORE}
                for index in range(len(self.sets[phase]))}
        return {index: names & set(classes) for index, names in self._seen[phase].items()}

    def write(self, phase: str, folder: str, step: Step, images: Optional[Sequence[Any]],
              labelled: Sequence[str]) -> Tuple[Dict[str, Any], Dict[str, int]]:
        """Label maps of these samples (all of them) with these classes, and a list of their names."""
        dataset = self.sets[phase]
        rest = IGNORE if not self.first or self.unseen == 'ignore' else 0
        table = np.full(256, IGNORE, np.uint8)
        for index, name in enumerate(self.classes):
            table[index] = step.classes.index(name) if name in (*labelled, *self.first) else rest
        counts = dict.fromkeys(labelled, 0)
        root = osp.abspath(osp.join(folder, phase))
        names = []
        for index in range(len(dataset)) if images is None else images:
            info = dataset.get_data_info(index)
            name = osp.relpath(info['img_path'], dataset.data_prefix['img_path'])[:-len(dataset.img_suffix)]
            labels = table[self._labels(phase, index)]
            target = osp.join(root, name + dataset.seg_map_suffix)
            os.makedirs(osp.dirname(target), exist_ok=True)
            Image.fromarray(labels).save(target)
            names.append(name)
            for label in np.unique(labels):
                if label != IGNORE and step.classes[label] in counts:
                    counts[step.classes[label]] += 1
        listed = f'{root}.txt'
        with open(listed, 'w', encoding='utf-8') as stream:
            stream.write('\n'.join(names) + '\n')
        return dict(ann_file=listed, data_prefix=dict(seg_map_path=root), img_suffix=dataset.img_suffix,
                    seg_map_suffix=dataset.seg_map_suffix), counts

    def meta(self, step: Step) -> Dict[str, Any]:
        """What a data set of a step knows of its classes."""
        return dict(classes=tuple(step.classes), palette=[self.palette.get(name, [0, 0, 0]) for name in step.classes])

    def dataset(self, step: Step, phase: str) -> Dict[str, Any]:
        """What the config of a data set of a step says otherwise: a class that knows no names of its own."""
        return dict(type='BaseSegDataset', **step.files[phase], reduce_zero_label=False)

    def evaluator(self, step: Step) -> Any:
        """The evaluator of a step, as far as it differs."""
        return None


# ---------------------------------------------------------------------------------------------------------------------
# configs


def _count_of(cfg: Config, classes: int) -> int:
    """The number of classes in the heads of the config.

    Raises:
        ValueError: it cannot be told.
    """
    counts = class_counts({key: value for key, value in cfg.model.items() if key not in ('backbone', 'rpn_head')})
    if any(key in str(cfg.model) for key in ('num_things_classes', 'num_stuff_classes')):
        raise ValueError('the model counts things and stuff apart (num_things_classes): such heads are not split')
    if classes in counts:
        return classes
    if len(counts) == 1:
        return int(counts.pop())
    raise ValueError(f'the heads of the model have {", ".join(map(str, sorted(counts))) or "no number of"} classes and '
                     f'the data {classes}: give every head num_classes={classes}')


def count_overrides(section: Any, old: int, new: int) -> Any:
    """What a config must say for ``new`` classes instead of ``old``: changed entries, lists as a whole; None for none.

    Raises:
        ValueError: a loss weighs the classes one by one.

    Example:
        >>> count_overrides(dict(type='A', heads=[dict(num_classes=3), dict(k=1)], num_classes=3), 3, 5)
        {'heads': [{'num_classes': 5}, {'k': 1}], 'num_classes': 5}
        >>> count_overrides(dict(loss=dict(class_weight=[1.0, 1.0, 0.1])), 2, 3)
        {'loss': {'class_weight': [1.0, 1.0, 1.0, 0.1]}}
    """
    if isinstance(section, (list, tuple)):
        found = [count_overrides(value, old, new) for value in section]
        if not any(found):
            return None
        whole = copy.deepcopy([value.to_dict() if hasattr(value, 'to_dict') else value for value in section])
        return [_merged(value, change) if change else value for value, change in zip(whole, found)]
    if not hasattr(section, 'items'):
        return None
    result: Dict[str, Any] = {}
    for key, value in section.items():
        if key == 'num_classes' and value == old:
            result[key] = new
        elif key == 'class_weight' and isinstance(value, (list, tuple)) and len(value) in (old, old + 1):
            if len(set(value[:old])) > 1:
                raise ValueError(f'class_weight={list(value)}: a loss weighs the classes one by one. Take it out of '
                                 'the config, and give each step its own')
            result[key] = [value[0]] * new + list(value[old:])
        else:
            change = count_overrides(value, old, new)
            if change:
                result[key] = change
    return result or None


def _merged(value: Any, change: Mapping[str, Any]) -> Any:
    for key, part in change.items():
        value[key] = _merged(value[key], part) if isinstance(part, Mapping) else part
    return value


class _Name(str):
    """A variable in a config."""

    def __repr__(self) -> str:
        return str(self)


def _changes(cfg: Config, step: Step, work: Any, count: int, meta: Mapping[str, Any]) -> Dict[str, Any]:
    """What the config of a step says otherwise than the one that it is made from."""
    model = count_overrides({key: value for key, value in cfg.model.items() if key not in ('backbone', 'rpn_head')},
                            count, len(step.classes))
    changes: Dict[str, Any] = dict(model=model) if model else {}
    sections = {phase: _section(cfg, phase) for phase in ('train', 'val', 'test')
                if phase != 'test' or cfg.get('test_dataloader')}
    for phase, (section, depth) in sections.items():
        inner = work.dataset(step, 'val' if phase == 'test' else phase)
        if phase == 'test':  # the validation data, wherever those of the test were
            val = sections['val'][0]
            for key in ('data_root', 'data_prefix'):
                if key in val and val[key] != section.get(key):
                    inner[key] = {**val[key], **inner.get(key, {})} if hasattr(val[key], 'items') else val[key]
        inner['metainfo'] = dict(meta)
        for _ in range(depth):
            inner = dict(dataset=inner)
        changes[f'{phase}_dataloader'] = dict(dataset=inner)
        evaluator = work.evaluator(step) if phase != 'train' and cfg.get(f'{phase}_evaluator') else None
        if evaluator is not None:
            changes[f'{phase}_evaluator'] = evaluator
    return changes


def config_text(cfg: Config, file: str, step: Step, work: Any, count: int, steps: Sequence[Step]) -> str:
    """The config of a step."""
    meta = work.meta(step)
    old = [name for name in step.classes if name not in (*step.new, *work.first)]
    head = [f'Written by kd-mm split: {f"step {step.index} of {len(steps) - 1}" if step.index else "all classes"}.',
            f'Labelled in training: {", ".join(step.new)} ({step.images[0]} of {step.images[1]} images).']
    if old:
        head.append(f'Known before: {", ".join(old)}. Teacher: step{step.index - 1}.py.')
    comment = ''.join(textwrap.fill(line, 110, initial_indent='# ', subsequent_indent='#   ') + '\n' for line in head)
    if Config._is_lazy_import(file):  # such a file is no _base_ of one in the other style
        whole = Config(cfg.to_dict())
        whole.merge_from_dict(_changes(cfg, step, work, count, meta))
        return f'{comment}\n{whole.pretty_text}'
    changes = {**meta, **_changes(cfg, step, work, count, {name: _Name(name) for name in meta})}
    for kind in ('dataloader', 'evaluator'):
        if changes.get(f'test_{kind}') is not None and changes[f'test_{kind}'] == changes[f'val_{kind}']:
            changes[f'test_{kind}'] = _Name(f'val_{kind}')
    body = '\n'.join(f'{key} = {pprint.pformat(value, width=110, sort_dicts=False)}' for key, value in changes.items())
    return f'{comment}\n_base_ = {file!r}\n\n{body}\n'
