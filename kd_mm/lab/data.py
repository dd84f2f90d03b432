"""Some samples of a config's data, through its pipeline, before a training meets them."""

import contextlib
import copy
import functools
import io
import json
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, FUNCTIONS
from PIL import Image, UnidentifiedImageError

from kd_mm.hosts.models import as_names, class_names, classes_of, ignored_label, inner_dataset, scope_of_config
from kd_mm.hosts.packages import lacking
from kd_mm.hosts.synthetic import find_num_classes
from kd_mm.lab.configs import type_name
from kd_mm.lab.models import data_scope_of, scope_of
from kd_mm.ops import words
from kd_mm.ops.modes import preserved_random_state

#: Metrics that give their predictions to pycocotools as results for the annotations.
OF_COCO = ('CocoMetric', 'CocoOccludedSeparatedMetric', 'CocoVideoMetric', 'OVCocoMetric', 'RotatedCocoMetric')
#: Lists of an annotation file in COCO's form.
SECTIONS = ('images', 'annotations', 'categories')


@dataclass
class DataReport:
    """What a look at the data found.

    Attributes:
        problems: what stops a training or spoils it.
        warnings: what may be meant so.
        notes: what was looked at.
        length: samples of the training set, None if it could not be opened.
    """

    problems: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    length: Optional[int] = None


def look_at_data(cfg: Config, count: int, model: Any = None) -> DataReport:
    """Load some samples of each data set that a training reads.

    Args:
        cfg: a config of :func:`kd_mm.lab.configs.read_config`.
        count: samples of each, spread over it.
        model: the student, whose number of classes labels may have; None if it could not be built.
    """
    report = DataReport()
    for phase in ('train', 'val') if cfg.get('val_cfg') is not None else ('train', ):
        loader = cfg.get(f'{phase}_dataloader')
        if not loader or not loader.get('dataset'):
            report.problems.append(f'the config has no {phase}_dataloader with a dataset. Inherit from a whole config '
                                   "of the host, such as 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'")
            continue
        with scope_of(cfg), preserved_random_state(0):
            _one_set(cfg, phase, loader, count, model, report)
    if cfg.get('val_cfg') is not None:
        report.problems += evaluation_problems(cfg.get('val_evaluator'))
    return report


class EmptyData(ValueError):
    """A data set has no sample; the message says why that may be."""


def open_set(cfg: Config, section: Any) -> Any:
    """The data set of a section of a config, in the scope of the Runner's; its readers raise anything.

    Raises:
        EmptyData: it has no sample.
    """
    with data_scope_of(cfg):
        return _open_set(cfg, section)


def _open_set(cfg: Config, section: Any) -> Any:
    try:
        return DATASETS.build(section)
    except ValueError as error:
        if is_empty(error):
            raise EmptyData(nothing_in(cfg, section)) from error
        raise


def training_samples(cfg: Config) -> Optional[int]:
    """How many samples the training set has; None where it cannot be opened, for example on another machine."""
    try:
        with scope_of(cfg), preserved_random_state(0), contextlib.redirect_stdout(io.StringIO()):
            return len(open_set(cfg, cfg.train_dataloader.dataset))
    except Exception:  # the registry and the readers of annotations raise anything
        return None


def picture_size(cfg: Config, count: int = 8) -> Optional[Tuple[int, int]]:
    """(H, W) that hold some training pictures as the pipeline gives them; None where they cannot be read.

    Args:
        cfg: a config with a train_dataloader.
        count: samples that are loaded, spread over the set.
    """
    try:
        with scope_of(cfg), preserved_random_state(0), contextlib.redirect_stdout(io.StringIO()):
            dataset = open_set(cfg, cfg.train_dataloader.dataset)
            sizes = [tuple(dataset[index]['inputs'].shape[-2:]) for index in spread(len(dataset), count)]
        return max(height for height, _ in sizes), max(width for _, width in sizes)
    except Exception:  # the registry, the readers and the transforms raise anything
        return None


def spread(length: int, count: int) -> List[int]:
    """Indices of at most ``count`` samples, spread over ``length``.

    Example:
        >>> spread(10, 3), spread(2, 3)
        ([0, 3, 6], [0, 1])
    """
    count = min(count, length)
    return sorted({index * length // count for index in range(count)})


def is_empty(error: Exception) -> bool:
    """Whether a data set could not be opened because it has no sample: the host joins what it has, and has none."""
    return 'need at least one array to concatenate' in str(error)


def nothing_in(cfg: Config, section: Any) -> str:
    """Why a data set may have no sample, and the mend."""
    inner = section
    while hasattr(inner, 'get') and inner_dataset(inner) is not None:
        inner = inner_dataset(inner)
    file = os.path.join(inner.get('data_root') or '', str(inner.get('ann_file') or ''))
    names = class_names(Config(dict(default_scope=scope_of_config(cfg), train_dataloader=dict(dataset=inner))),
                        counted=False)
    text = 'the data set has no sample: no picture is listed, or none is left after filter_cfg'
    there: List[str] = []
    try:
        with open(file, encoding='utf-8') as stream:
            there = [str(entry['name']) for entry in json.load(stream)['categories']]
    except (KeyError, OSError, TypeError, ValueError):  # no file in COCO's form
        pass
    if names and there and not set(names) & set(there):
        return (f'{text}. None of its classes ({_some(names)}) is a category of {file} ({_some(there)}): give the '
                'classes of the data, metainfo=dict(classes=...)')
    return f'{text}. Look at data_root, data_prefix and ann_file' + (
        f', and whether its classes ({_some(names)}) are those of the annotations' if names else '')


def empty_sets(cfg: Config, phases: Sequence[str]) -> List[str]:
    """Which data sets of a training have no sample, as sentences."""
    found = []
    for phase in phases:
        section = (cfg.get(f'{phase}_dataloader') or {}).get('dataset')
        try:
            with scope_of(cfg):
                if section:
                    open_set(cfg, section)
        except EmptyData as error:
            found.append(f'{phase}_dataloader.dataset: {error}')
    return found


def evaluation_problems(evaluator: Any, phase: str = 'val') -> List[str]:
    """What would stop an evaluation in COCO's form after its predictions, so at the end of an epoch."""
    problems = []
    for metric in evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]:
        file = metric.get('ann_file') if isinstance(metric, dict) else None
        if type_name(metric) not in OF_COCO or not isinstance(file, str) or not (
                file.endswith('.json') and os.path.isfile(file)):
            continue
        try:
            with open(file, encoding='utf-8') as stream:
                content = json.load(stream)
        except ValueError:  # the data set that reads it says so
            continue
        if isinstance(content, dict) and 'info' not in content and _info_is_needed():
            problems.append(f"{phase}_evaluator: {file} has no 'info', and the installed pycocotools stops without it "
                            "at the first evaluation (KeyError: 'info'). Add \"info\": {} to the file")
    return problems


def _info_is_needed() -> bool:
    """Some versions of pycocotools copy ``info`` of the annotations to the results, whether it is there or not."""
    from pycocotools.coco import COCO  # only where a config names it; mmseg comes without

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dict(images=[dict(id=0)], annotations=[], categories=[dict(id=0, name='')])
        truth.createIndex()
        try:
            truth.loadRes([dict(image_id=0, category_id=0, bbox=[0, 0, 1, 1], score=1.0)])
        except KeyError:
            return True
    return False


def _one_set(cfg: Config, phase: str, loader: Any, count: int, model: Any, report: DataReport) -> None:
    where, section = f'{phase}_dataloader.dataset', loader['dataset']
    try:
        dataset = open_set(cfg, section)
        length = len(dataset)
        if not length:
            raise EmptyData(nothing_in(cfg, section))
    except EmptyData as error:
        report.problems.append(f'{where}: {error}')
        return
    except Exception as error:  # the registry and the readers of annotations raise anything
        report.problems.append(f'{where} cannot be opened: {_reason(error)}{_lacking(section, error)}')
        return
    if phase == 'train':
        report.length = length
    chosen = spread(length, count)
    report.notes.append(f'{len(chosen)} of {length} samples of {where}')
    objects, counted = 0, False
    labels: Set[int] = set()
    loaded: List[Any] = []
    for index in chosen:
        files = _files(dataset, index)
        broken = [text for text in map(_broken, files) if text]
        if broken:
            report.problems += [f'{where}, sample {index}: {text}' for text in broken]
            continue
        try:
            loaded.append(dataset[index])
            sample = loaded[-1]['data_samples']
        except Exception as error:  # transforms raise anything
            report.problems.append(f'{where}, sample {index} ({", ".join(files) or "no file is known"}): its pipeline '
                                   f'fails: {_reason(error)}')
            continue
        found = _labels(sample, ignored_label(model))
        if found is not None:
            counted = True
            objects += int(found.numel())
            labels.update(found.unique().tolist())
    if counted and not objects:
        report.warnings.append(f'{where}: none of {len(chosen)} samples has a label. Are its classes {_names(dataset)} '
                               'the names of the categories in the annotation file?')
    _judge_labels(where, labels, model, report)
    if loaded:
        try:
            _batch(loader, loaded)
        except Exception as error:  # functions of users and hosts raise anything
            report.problems.append(f'{phase}_dataloader.collate_fn cannot make a batch of '
                                   f'{words.count(len(loaded), "sample")}: {_reason(error)}')


def _batch(loader: Any, samples: List[Any]) -> Any:
    """Some samples as one batch, as the Runner's loader joins them."""
    function = copy.deepcopy(loader.get('collate_fn') or dict(type='pseudo_collate'))
    if not callable(function):
        kind = function.pop('type')
        function = functools.partial(FUNCTIONS.get(kind) if isinstance(kind, str) else kind, **function)
    return function(samples)


def _judge_labels(where: str, labels: Set[int], model: Any, report: DataReport) -> None:
    try:
        classes = find_num_classes(model) if model is not None else None
    except ValueError:  # no head tells it
        classes = None
    beyond = sorted(label for label in labels if classes is not None and label >= classes)
    if beyond:
        report.problems.append(f'{where}: the labels {", ".join(map(str, beyond[:5]))} are beyond the {classes} '
                               'classes of the student (num_classes of its heads, 0 is the first label). Mend '
                               f'num_classes or the label maps ({ignored_label(model)} is what is ignored)')


def _labels(sample: Any, ignored: int) -> Optional[torch.Tensor]:
    """All labels of a sample but those that its model ignores; None where it has none by its kind."""
    if 'gt_instances' in sample and 'labels' in sample.gt_instances:
        return sample.gt_instances.labels
    if 'gt_sem_seg' in sample:
        data = sample.gt_sem_seg.data
        return data[data != ignored]
    return None


def _files(dataset: Any, index: int) -> List[str]:
    """The files of a sample, as far as the data set tells."""
    try:
        info: Dict[str, Any] = dataset.get_data_info(index)
    except Exception:  # data sets made of several, or of a kind of their own
        return []
    return [info[key] for key in ('img_path', 'seg_map_path') if isinstance(info.get(key), str)]


def _broken(file: str) -> Optional[str]:
    """What is wrong with a picture; None for nothing, or where it is on no local disk."""
    if '://' in file:
        return None
    if not os.path.isfile(file):
        return f'no such file: {file}'
    try:
        with Image.open(file) as picture:
            picture.load()  # OpenCV gives a cut file a grey end, and says nothing
    except UnidentifiedImageError:  # bands of 16 bits, volumes, arrays: whether they can be read the pipeline says
        return f'{file} is empty' if not os.path.getsize(file) else None
    except Exception as error:  # PIL raises anything for a damaged file
        return f'{file} cannot be read as a picture: {error}. It is cut or damaged; fetch it again'
    return None


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return lacking(error) or f'{type(error).__name__}: {text[-1] if text else "no message"}'


def _names(dataset: Any) -> str:
    return f'({_some(as_names(classes_of(getattr(dataset, "metainfo", None)) or ()))})'


def _some(names: Sequence[str]) -> str:
    return ', '.join(map(str, names[:5])) + (', ...' if len(names) > 5 else '')


def _lacking(section: Any, error: Exception) -> str:
    """Which entries of an annotation file lack the key of a KeyError."""
    while hasattr(section, 'get') and 'dataset' in section:
        section = section['dataset']
    file = ''
    if hasattr(section, 'get') and isinstance(section.get('ann_file'), str):
        file = os.path.join(section.get('data_root') or '', section['ann_file'])
    key = next((part.args[0] for part in _chain(error) if isinstance(part, KeyError) and part.args), None)
    if not isinstance(key, str) and not file.endswith('.json'):
        return ''
    if not os.path.isfile(file):
        return f' (annotation file {file}: looked at {os.path.abspath(file)})' if file else ''
    try:
        with open(file, encoding='utf-8') as stream:
            content = json.load(stream)
    except ValueError as wrong:
        return f' ({file} is no whole JSON file: {wrong})'
    if not isinstance(content, dict):
        return ''
    missing = [name for name in SECTIONS if name not in content]
    if missing:
        return f' ({file} has no {", ".join(map(repr, missing))}; COCO\'s form has {", ".join(SECTIONS)})'
    if not isinstance(key, str):
        return ''
    for name in SECTIONS:
        without = [entry for entry in content[name] if isinstance(entry, dict) and key not in entry]
        if without and _usual(name, key):
            return (f' ({len(without)} of {len(content[name])} {name} in {file} have no {key!r}, first: '
                    f'{_short(without)})')
    return ''


def _usual(section: str, key: str) -> bool:
    keys = dict(images=('id', 'file_name', 'height', 'width'), categories=('id', 'name'), annotations=(
        'id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd', 'segmentation'))
    return key in keys[section]


def _short(entries: Sequence[Any]) -> str:
    text = json.dumps(entries[0])
    return text if len(text) <= 80 else f'{text[:77]}...'


def _chain(error: Optional[BaseException]) -> List[BaseException]:
    found: List[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
