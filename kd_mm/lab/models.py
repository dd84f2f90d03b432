"""The models of a config without a Runner, on random data."""

import logging
import warnings
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.utils import import_modules_from_strings
from torch import nn

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.hook import folder_of
from kd_mm.hosts.models import build_model, class_names, scope_of_config, start_counters
from kd_mm.hosts.packages import installed
from kd_mm.hosts.semi import inner_student
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.hosts.table import host_of_config, packages
from kd_mm.lab.configs import training_length


@contextmanager
def scope_of(cfg: Config) -> Iterator[None]:
    """The config's default scope inside, and the counters that some parts of a model read from the Runner's log.

    The hosts are quiet meanwhile: they log several lines for every parameter that they initialise.
    """
    start_counters()
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with DefaultScope.overwrite_default_scope(scope_of_config(cfg)), warnings.catch_warnings():
            warnings.filterwarnings('ignore', module='|'.join(('mmcv', 'mmengine', *packages())))
            warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def data_scope_of(cfg: Config) -> Iterator[None]:
    """The scope in which the Runner builds data sets and pipelines of a config.

    It builds them while it builds a loop, whose config has the scope of a ``_base_`` where it comes from one: a scope
    with nothing but models gets its data from there.
    """
    loops = [cfg.get(f'{phase}_cfg') or {} for phase in ('train', 'val', 'test')]
    scope = next((loop.get('_scope_') for loop in loops if loop), None) or scope_of_config(cfg)
    found = host_of_config(cfg)
    names = dict.fromkeys((scope, scope_of_config(cfg), None if found is None else found.host.scope))
    import_modules_from_strings([f'{name}.datasets' for name in names if name and installed(f'{name}.datasets')])
    with DefaultScope.overwrite_default_scope(scope):
        yield


def build_student(cfg: Config, device: Any = 'cpu') -> nn.Module:
    """The config's model on ``device``, with random weights: nothing is loaded or fetched.

    Of a semi-supervised detector the one inside that is trained.
    """
    return inner_student(build_whole(cfg, device))


def build_whole(cfg: Config, device: Any = 'cpu') -> nn.Module:
    """The same as it stands in the config."""
    model = build_model(cfg, scope_of_config(cfg))
    if hasattr(model, 'init_weights'):
        model.init_weights()  # type: ignore[operator]
    return model.to(device)


def random_batch(model: nn.Module, batch: int, shape: Tuple[int, int], device: Any = 'cpu',
                 training: bool = True, masks: bool = False) -> Dict[str, Any]:
    """One random batch that went through the model's data preprocessor; the images have ``shape``."""
    preprocessor: Any = model.data_preprocessor
    size = getattr(preprocessor, 'size', None)
    try:
        if size is not None:
            preprocessor.size = tuple(shape)  # mmseg pads to its crop size
        batch_of = synthetic_batch(model, batch, shape, device=device, masks=masks, training=training)
        return preprocessor(batch_of, training)
    finally:
        if size is not None:
            preprocessor.size = size


def check_device(name: str) -> None:
    """Refuse a device that torch cannot use here.

    Raises:
        ValueError: naming what there is.
    """
    try:
        torch.zeros(1, device=name)
    except Exception as error:  # torch raises anything, RuntimeError and AssertionError among it
        there = ', '.join(f'cuda:{index}' for index in range(torch.cuda.device_count()))
        raise ValueError(f'--device {name} cannot be used here ({str(error).splitlines()[0][:80]}). There is: cpu'
                         f'{", cuda, " + there if there else ""}') from error


def hint_of(error: Exception) -> str:
    """What to change on the command line where a model does not take some random images."""
    if 'more than 1 value per channel' in str(error):
        return 'a batch norm needs more than one value of each channel: give a larger --batch'
    return 'if the model needs another size, give --shape H W'


def make_distiller(cfg: Config, student: nn.Module, arguments: Dict[str, Any], samples: Optional[int] = None
                   ) -> Distiller:
    """The distiller as the hook builds it, except that the class names come from the config and not from the data.

    Args:
        cfg, student: what is trained.
        arguments: of the hook.
        samples: of the training set, where it was opened.

    Raises:
        ConfigProblems: the configuration is wrong.
    """
    return Distiller(student, classes=class_names(cfg, counted=False), scope=scope_of_config(cfg),
                     max_steps=training_length(cfg, samples)[0], folder=folder_of(cfg), **arguments)


def probe_step(distiller: Distiller) -> int:
    """The earliest of some steps at which most terms have a weight: a warm-up starts at 0, a window opens late."""
    length = distiller.max_steps
    steps = [0, 1, 100, 1000, *(length * part // 8 for part in range(1, 8)), length - 1]
    counts: Dict[int, int] = {}
    for step in sorted({step for step in steps if 0 <= step < max(length, 1)} or {0}):
        distiller.step = step
        counts[step] = len(distiller.active_terms())
    distiller.step = 0
    return max(counts, key=lambda step: (counts[step], -step))
