"""Batch normalisation of parts that exist in training only."""

import torch.nn.functional as F
from torch import Tensor, nn


def one_value(features: Tensor) -> bool:
    """Whether (N, C, H, W) has one value a channel: an image of one cell, as the last batch of an epoch may be.

    Example:
        >>> import torch
        >>> one_value(torch.zeros(1, 8, 1, 1)), one_value(torch.zeros(2, 8, 1, 1))
        (True, False)
    """
    return features.shape[0] * features.shape[2] * features.shape[3] == 1


def batch_standardise(features: Tensor, eps: float = 1e-5) -> Tensor:
    """``(F - mean) / sqrt(var + eps)`` for each channel over images and cells, with the biased variance.

    One value a channel is its own mean: it becomes 0, with gradient 0.

    Example:
        >>> import torch
        >>> batch_standardise(torch.tensor([0., 2.]).view(1, 1, 1, 2)).flatten().round()
        tensor([-1.,  1.])
    """
    return features * 0 if one_value(features) else F.batch_norm(features, None, None, training=True, eps=eps)


class BatchNorm(nn.BatchNorm2d):
    """torch's batch norm, which also has an answer for one value a channel where torch raises.

    The value is its own mean, so what comes out is the bias, with gradient 0 to the input.  Running statistics stay as
    they are: one value has no unbiased variance.

    Example:
        >>> import torch
        >>> BatchNorm(2)(torch.ones(1, 2, 1, 1)).flatten()
        tensor([0., 0.], grad_fn=<ViewBackward0>)
    """

    def forward(self, features: Tensor) -> Tensor:
        if not one_value(features) or not (self.training or self.running_mean is None):
            return super().forward(features)
        centred = features * 0
        return centred if self.weight is None else centred * self.weight[:, None, None] + self.bias[:, None, None]
