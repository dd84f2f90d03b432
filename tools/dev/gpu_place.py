"""A real Runner on random pictures, for the checks of tools/dev/gpu_check.py."""

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from kd_mm.hosts.models import scope_of_config
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.lab.configs import hook_arguments, hook_entries, read_config
from kd_mm.lab.cost import Bench
from kd_mm.lab.models import build_student, scope_of
from kd_mm.ops.problems import Problems

ROOT = Path(__file__).resolve().parents[2]
DETECTOR, SEGMENTOR = 'configs/profile/retinanet_cwd.py', 'configs/profile/pspnet_cwd.py'


class Skip(Exception):  # noqa: N818  (a result, not an error)
    """A check that cannot be made here; why."""


class RandomImages(torch.utils.data.Dataset):
    """Some random pictures with targets, as the host's own data sets give them."""

    def __init__(self, cfg: Config, count: int, shape: Tuple[int, int]):
        with scope_of(cfg):
            batch = synthetic_batch(build_student(cfg), count, shape)
        self.items = [dict(inputs=picture, data_samples=sample)
                      for picture, sample in zip(batch['inputs'], batch['data_samples'])]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        return copy.deepcopy(self.items[index])


class Losses(Hook):
    """Keeps the losses of every step."""

    def __init__(self) -> None:
        self.steps: List[Dict[str, float]] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.steps.append({key: float(value) for key, value in outputs.items()})


@dataclass
class Place:
    """Where and how large everything runs."""

    device: torch.device
    out: Path
    shape: Tuple[int, int] = (128, 128)
    batch: int = 2
    costs: Sequence[str] = ()
    steps: int = 10
    _data: Dict[str, RandomImages] = field(default_factory=dict)
    _runs: int = 0

    @property
    def cuda(self) -> bool:
        return self.device.type == 'cuda'

    def config(self, name: str = DETECTOR, **hook: Any) -> Config:
        """A small config with changes of its distillation hook."""
        cfg = read_config(str(ROOT / name))
        hook_entries(cfg)[0].update(hook)
        return cfg

    def train(self, cfg: Config, steps: int = 3, distil: bool = True, **changes: Any) -> Tuple[Any, Losses]:
        """A real Runner, some steps on random pictures; the Runner and the losses."""
        self._runs += 1
        key = f'{cfg.model.type}'
        data = self._data.setdefault(key, RandomImages(cfg, 2 * self.batch, self.shape))
        if 'size' in (cfg.model.get('data_preprocessor') or {}):
            cfg.model.data_preprocessor.size = self.shape
        losses = Losses()
        folder = changes.pop('work_dir', None) or str(self.out / f'run_{self._runs}')
        options = dict(optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3, momentum=0.9)))
        options.update(changes)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            runner = Runner(
                model=copy.deepcopy(cfg.model), work_dir=folder, experiment_name=f'gpu_check_{self._runs}',
                train_dataloader=dict(dataset=data, batch_size=self.batch, num_workers=0,
                                      sampler=dict(type='DefaultSampler', shuffle=False)),
                train_cfg=dict(type='IterBasedTrainLoop', max_iters=steps, val_interval=steps + 1),
                custom_hooks=[copy.deepcopy(entry) for entry in hook_entries(cfg)] if distil else [],
                default_hooks=dict(logger=None, checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)),
                default_scope=scope_of_config(cfg), randomness=dict(seed=0, deterministic=self.cuda), log_level='ERROR',
                cfg=Config(dict(model=copy.deepcopy(cfg.model))), **options)
            runner.register_hook(losses)
            runner.train()
        return runner, losses

    def bench(self, name: str, batch: int, shape: Tuple[int, int]) -> Bench:
        """Student, teacher and one batch without a Runner."""
        cfg = self.config(name)
        problems = Problems()
        arguments = hook_arguments(hook_entries(cfg)[0], problems)
        problems.raise_any()
        with scope_of(cfg):
            torch.manual_seed(0)
            bench = Bench(cfg, batch, shape, self.device)
            bench.step(bench.fresh())
            bench.distil(arguments)
        return bench


def distance(first: nn.Module, second: nn.Module) -> float:
    """The largest difference of two models' weights, relative to the largest weight of the tensor."""
    others: Dict[str, Tensor] = second.state_dict()
    return max(float((value.double() - others[key].double()).abs().max() / value.double().abs().max().clamp(min=1e-12))
               for key, value in first.state_dict().items() if value.is_floating_point() and value.numel())


def must(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(text)


def close(first: Losses, second: Losses, tolerance: float) -> float:
    """The largest relative difference of the losses of two runs.

    Raises:
        AssertionError: it is above the tolerance.
    """
    found = max(abs(a[key] - b[key]) / max(abs(a[key]), 1e-6) for a, b in zip(first.steps, second.steps)
                for key in a if 'loss' in key)
    must(found <= tolerance, f'the losses differ by {found:.2g} (relative), more than {tolerance:.2g}')
    return found
