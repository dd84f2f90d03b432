"""The validation of a Runner for any model, on all of its images or on the same few each time."""

import copy
import json
import os
import tempfile
from contextlib import nullcontext
from typing import Any, ContextManager, Dict, List, NamedTuple, Optional, Sequence

import torch
from mmengine.fileio import get_text
from mmengine.runner.amp import autocast
from torch.utils.data import Subset

from kd_mm.ops.checks import number, whole
from kd_mm.ops.problems import ConfigProblems


class Wish(NamedTuple):
    """Which images of a validation are asked for.

    Attributes:
        images: how many; None for all.
        seed: of their choice; None for the first ones.
    """

    images: Optional[int] = None
    seed: Optional[int] = None

    def words(self, total: int) -> str:
        """The same as a text, of ``total`` images.

        Example:
            >>> Wish(200).words(5000), Wish(200, 3).words(5000), Wish().words(9)
            ('the first 200 of 5000 validation images', '200 of 5000 validation images (seed 3)', 'the validation data')
        """
        if self.images is None or self.images >= total:
            return 'the validation data'
        text = f'{self.images} of {total} validation images'
        return f'the first {text}' if self.seed is None else f'{text} (seed {self.seed})'


def wish(owner: str, name: str, value: Any) -> Optional[Wish]:
    """``score_teacher`` as it is written in a config; None for no scoring.

    Args:
        owner, name: for messages.
        value: True (all images), a number of images (the first ones), ``dict(images=N, seed=S)`` (chosen by the seed;
            without one the first ones), or False.

    Raises:
        ValueError: anything else.

    Example:
        >>> wish('hook', 'score_teacher', dict(images=50, seed=1)), wish('hook', 'score_teacher', False)
        (Wish(images=50, seed=1), None)
    """
    if isinstance(value, bool) or value is None:
        return Wish() if value else None
    if hasattr(value, 'keys'):
        unknown = [key for key in value if key not in Wish._fields]
        if unknown or 'images' not in value:
            raise ValueError(f'{owner}: {name}={dict(value)!r} must be dict(images=N), or dict(images=N, seed=S)')
        seed = value.get('seed')
        if seed is not None:
            seed = whole(owner, f'{name}.seed', seed, 0)
            number(owner, f'{name}.seed', seed, 0, 2**32)
        return Wish(whole(owner, f'{name}.images', value['images']), seed)
    try:
        return Wish(whole(owner, name, value))
    except ValueError as error:
        raise ValueError(f'{error}; or True for all images, or dict(images=N, seed=S)') from None


class Some(Subset):  # type: ignore[type-arg]
    """Some samples of a data set; not copied, as the host does with what it makes a loader of: it may be large."""

    def __deepcopy__(self, memo: Any) -> 'Some':
        return self


class Trial:
    """Evaluates models as the Runner's own validation does.

    Args:
        runner: with a validation.
        asked: which images.

    Raises:
        ValueError: its evaluator cannot judge a part of the images.
    """

    def __init__(self, runner: Any, asked: Wish):
        loop = runner.val_loop
        dataset = loop.dataloader.dataset
        self.total = len(dataset)
        self.loader, self.evaluator, self.size = loop.dataloader, loop.evaluator, self.total
        #: whether these are not all images.
        self.partial = asked.images is not None and asked.images < self.total
        self.words = asked.words(self.total)
        self._half = bool(getattr(loop, 'fp16', False))
        if not self.partial:
            return
        assert asked.images is not None
        self.size = asked.images
        chosen = list(range(asked.images))
        if asked.seed is not None:
            order = torch.randperm(self.total, generator=torch.Generator().manual_seed(asked.seed))
            chosen = sorted(order[:asked.images].tolist())
        self._folder = tempfile.TemporaryDirectory(prefix='kd_mm_')
        self.evaluator = self._own_evaluator(runner, dataset, chosen)
        section = {key: value for key, value in runner.cfg.val_dataloader.items()
                   if key not in ('batch_sampler', 'num_batch_per_epoch', 'dataset')}
        section.update(dataset=Some(dataset, chosen), sampler=dict(type='DefaultSampler', shuffle=False))
        if section.get('persistent_workers'):  # a second set of processes would wait all the time
            section['persistent_workers'] = False
        self.loader = runner.build_dataloader(section, seed=runner.seed)

    @torch.no_grad()
    def run(self, model: Any) -> Dict[str, Any]:
        """What a model in eval mode scores."""
        precision: ContextManager[Any] = autocast(enabled=True) if self._half else nullcontext()
        with precision:
            for batch in self.loader:
                self.evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
        return dict(self.evaluator.evaluate(self.size))

    def _own_evaluator(self, runner: Any, dataset: Any, chosen: Sequence[int]) -> Any:
        """One that knows no other images: left out, they would count as images where nothing was found."""
        section = runner.cfg.get('val_evaluator')
        if hasattr(runner.val_loop.evaluator, 'dataset_prefixes'):
            raise ConfigProblems(f'score_teacher: {type(runner.val_loop.evaluator).__name__} judges whole data sets, '
                                 'and no part of the images. Use score_teacher=True')
        if not isinstance(section, (dict, list)):
            raise ConfigProblems('score_teacher: a part of the images needs val_evaluator as a config. Use '
                                 'score_teacher=True')
        found = runner.build_evaluator(self._for_images(copy.deepcopy(section), dataset, chosen))
        found.dataset_meta = getattr(dataset, 'metainfo', None)
        return found

    def _for_images(self, section: Any, dataset: Any, chosen: Sequence[int]) -> Any:
        """The config of an evaluator with an annotation file of these images alone, where it reads one."""
        if isinstance(section, list):
            return [self._for_images(part, dataset, chosen) for part in section]
        if 'metrics' in section:
            section['metrics'] = self._for_images(section['metrics'], dataset, chosen)
        if isinstance(section.get('ann_file'), str):
            names: List[Any] = [dataset.get_data_info(index)['img_id'] for index in chosen]
            section['ann_file'] = annotations_of(section, names, self._folder.name)
        return section


def annotations_of(section: Any, names: Sequence[Any], folder: str) -> str:
    """A file with the annotations of some images.

    Args:
        section: config of an evaluator, with ``ann_file`` in COCO's form, or CrowdHuman's (a line of JSON an image).
        names: ``img_id`` of the images, in the order of the file.
        folder: to write to.

    Raises:
        ValueError: a file of another form.
    """
    file, wanted = section['ann_file'], set(names)
    text = get_text(file, backend_args=section.get('backend_args'))
    path = os.path.join(folder, f'{len(os.listdir(folder))}_{os.path.basename(file)}')
    if file.endswith('.odgt'):
        text = '\n'.join(line for line in text.splitlines() if line.strip() and json.loads(line)['ID'] in wanted)
    else:
        content = json.loads(text) if file.endswith('.json') else None
        if not isinstance(content, dict) or not {'images', 'annotations'} <= set(content):
            raise ConfigProblems(f'score_teacher: {section.get("type")} judges by {file}, of which no part can be '
                                 "taken: it is neither in COCO's form nor in CrowdHuman's. Use score_teacher=True")
        content['images'] = [image for image in content['images'] if image['id'] in wanted]
        content['annotations'] = [entry for entry in content['annotations'] if entry['image_id'] in wanted]
        text = json.dumps(content)
    with open(path, 'w', encoding='utf-8') as stream:
        stream.write(text)
    return path
