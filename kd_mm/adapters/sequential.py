"""Several adapters, one after the other."""

from typing import Any, Sequence, Tuple

import torch
from torch import nn

from kd_mm.adapters.base import Adapter
from kd_mm.registry import MODELS, build
from kd_mm.types.batch import Features


@MODELS.register_module()
class SequentialAdapter(Adapter):
    """Adapters applied in order, each to the result of the one before.

    Args:
        adapters: configs (or instances), at least one.

    Raises:
        ValueError: the list is empty.

    Example:
        >>> adapter = SequentialAdapter([dict(type='ConvAdapter'), dict(type='ResizeAdapter')])
        >>> student, teacher = adapter((torch.zeros(1, 4, 8, 8), ), (torch.zeros(1, 6, 16, 16), ))
        >>> student[0].shape
        torch.Size([1, 6, 16, 16])
    """

    def __init__(self, adapters: Sequence[Any]):
        super().__init__()
        if not adapters:
            raise ValueError('SequentialAdapter: adapters is empty; use adapter=None for no adapter')
        self.adapters = nn.ModuleList(build(adapter, Adapter, 'adapter') for adapter in adapters)
        self.prepared = False

    def prepare(self, student: Features, teacher: Features) -> None:
        if self.prepared:
            return
        for adapter in self.adapters:
            assert isinstance(adapter, Adapter)
            adapter.prepare(student, teacher)
            # Only shapes are wanted: in training mode this pass would move running statistics.
            training = adapter.training
            adapter.eval()
            with torch.no_grad():
                student, teacher = adapter(student, teacher)
            adapter.train(training)
        self.prepared = True

    def forward(self, student: Features, teacher: Features) -> Tuple[Features, Features]:
        self.prepare(student, teacher)
        for adapter in self.adapters:
            student, teacher = adapter(student, teacher)
        return student, teacher
