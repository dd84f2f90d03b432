"""Parts of your own, in a file of your own: an adapter, a loss over two taps, a region, a source of teachers.

A config finds them by ``custom_imports``; see ``config.py`` beside it.
"""

import torch
from torch import nn
from torch.nn import functional as F

from kd_mm.adapters.base import Adapter
from kd_mm.hosts.models import build_model, load_config
from kd_mm.losses.base.loss import KDLoss
from kd_mm.regions.base import RegionMask
from kd_mm.registry import MODELS, TEACHERS


@MODELS.register_module()
class TwoLayerAdapter(Adapter):
    """Two 1x1 convolutions a level, from the student's channels to the teacher's."""

    def __init__(self, width=32):
        super().__init__()
        self.width, self.levels = width, nn.ModuleList()

    def prepare(self, student, teacher):  # two tuples of tensors: the widths are known here
        if not self.levels:  # it is called again
            self.levels.extend(nn.Sequential(nn.Conv2d(s.shape[1], self.width, 1), nn.ReLU(),
                                             nn.Conv2d(self.width, t.shape[1], 1)) for s, t in zip(student, teacher))

    def forward(self, student, teacher):
        return tuple(level(tensor) for level, tensor in zip(self.levels, student)), teacher


@MODELS.register_module()
class StepBetweenLoss(KDLoss):
    """How the mean strength of the features grows from one tap to the next, as a smooth L1 between both models."""

    takes = (4, )  # maps (N, C, H, W)
    joint = True  # one number for all levels together
    same_channels = same_size = False  # so that no adapter is put before it where the models differ

    def joint_loss(self, student, teacher, batch, masks):
        if len(student) != 2:
            raise ValueError(f'StepBetweenLoss compares two levels, and {len(student)} are tapped: give student_at and '
                             'teacher_at two paths each')
        grown = [levels[1].abs().mean((1, 2, 3)) - levels[0].abs().mean((1, 2, 3)) for levels in (student, teacher)]
        return F.smooth_l1_loss(*grown)


@MODELS.register_module()
class LowerPartRegion(RegionMask):
    """The lower part of each picture, where the road is.

    Args:
        share: of the height, above 0.
    """

    def __init__(self, share=0.5):
        super().__init__()
        self.share = share

    def forward(self, features, batch):  # features give sizes and device; batch has boxes, label maps and sizes
        masks = []
        for level in features:
            height = level.shape[2]
            mask = level.new_zeros(len(level), 1, *level.shape[2:])
            mask[:, :, round(height * (1 - self.share)):] = 1
            masks.append(mask)
        return tuple(masks)


@TEACHERS.register_module()
def AveragedTeacher(spec, config, files):
    """A model of the host whose weights are the mean of those in several checkpoints.

    Args:
        spec: what kd_mm knows: the student, the scope, the seed, ...
        config: of the model.
        files: checkpoints of it.
    """
    model = build_model(load_config(config)[0], spec.scope)
    states = [torch.load(file, map_location='cpu', weights_only=False)['state_dict'] for file in files]
    model.load_state_dict({key: sum(state[key] for state in states) / len(states) if value.is_floating_point()
                           else value for key, value in states[0].items()})
    return model
