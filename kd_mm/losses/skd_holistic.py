"""Holistic distillation: a discriminator tells the student's segmentation maps from the teacher's."""

import functools
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss, labelled
from kd_mm.losses.base.opponent import Opponent, SpectralConv2d, make_optimizer
from kd_mm.ops.checks import boolean, from_zero, one_of, positive, whole
from kd_mm.ops.functional import parameter_options, resize, safe_sqrt
from kd_mm.ops.norms import BatchNorm
from kd_mm.registry import MODELS
from kd_mm.types import targets
from kd_mm.types.batch import Features, KDBatch, StepInfo

OBJECTIVES = ('wgan-gp', 'hinge')
#: Four halvings and a 4x4 window at the end: the smallest side that gives a score.
SMALLEST = 64
OPTIMIZER = dict(type='Adam', lr=4e-4, betas=(0.9, 0.99))


def image_mean(values: Tensor, present: Tensor) -> Tensor:
    """Mean over the images that are ``present`` (1 or 0) of the mean over each; 0 if there is none.

    Example:
        >>> image_mean(torch.tensor([1., 5.]).view(2, 1, 1, 1), torch.tensor([0., 1.]))
        tensor(5.)
    """
    return (values.flatten(1).mean(dim=1) * present).sum() / present.sum().clamp(min=1)


def generator_loss(student: Tensor, present: Tensor) -> Tensor:
    """``-mean D(S)``, for both objectives: what the student adds to its loss."""
    return -image_mean(student, present)


def discriminator_loss(objective: str, student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
    """What the discriminator minimises, without the gradient penalty.

    'wgan-gp': ``mean D(S) - mean D(T)``; 'hinge': ``mean max(0, 1 + D(S)) + mean max(0, 1 - D(T))``.

    Args:
        objective: one of the two.
        student: scores of the student's maps (N, 1, h, w).
        teacher: scores of the teacher's maps (N, 1, h, w).
        present: (N,), 0 for an image that is left out.

    Example:
        >>> scores = torch.tensor([0.5]).view(1, 1, 1, 1)
        >>> discriminator_loss('hinge', scores, scores, torch.ones(1))
        tensor(2.)
    """
    if objective == 'hinge':
        return image_mean(F.relu(1 + student), present) + image_mean(F.relu(1 - teacher), present)
    return image_mean(student, present) - image_mean(teacher, present)


class SelfAttention(nn.Module):
    """``x + gamma * V softmax(K^T Q)``: each cell adds what it finds in all cells (Zhang et al., SAGAN, ICML 2019).

    Queries and keys have an eighth of the channels; ``gamma`` starts at 0.
    """

    def __init__(self, channels: int, **options: Any):
        super().__init__()
        narrow = max(channels // 8, 1)
        self.query = nn.Conv2d(channels, narrow, 1, **options)
        self.key = nn.Conv2d(channels, narrow, 1, **options)
        self.value = nn.Conv2d(channels, channels, 1, **options)
        self.gamma = nn.Parameter(torch.zeros(1, **options))

    def forward(self, features: Tensor) -> Tensor:
        query, key, value = (part(features).flatten(2) for part in (self.query, self.key, self.value))
        attention = (query.transpose(1, 2) @ key).softmax(dim=2)  # (N, cells, cells), a row for each query
        return features + self.gamma * (value @ attention.transpose(1, 2)).view_as(features)


class Discriminator(nn.Module):
    """Scores of segmentation maps: high for the teacher's, low for the student's.

    Batch norm (always with the statistics of the batch), four 4x4 convolutions of stride 2 with spectral norm and
    leaky ReLU (0.1), self-attention after the third and the fourth, and a 4x4 convolution to one channel.

    Args:
        channels: of what it looks at.
        width: of the first convolution; it doubles with each.
    """

    def __init__(self, channels: int, width: int, **options: Any):
        super().__init__()
        self.norm = BatchNorm(channels, track_running_stats=False, **options)
        widths = [channels, *(width * 2**stage for stage in range(4))]
        self.convs = nn.ModuleList(
            SpectralConv2d(before, after, 4, stride=2, padding=1, **options)
            for before, after in zip(widths, widths[1:]))
        self.attentions = nn.ModuleList(SelfAttention(channels, **options) for channels in widths[3:])
        self.score = nn.Conv2d(widths[4], 1, 4, **options)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W), both sides at least 64, to (N, 1, H / 16 - 3, W / 16 - 3)."""
        maps = self.norm(maps)
        for index, conv in enumerate(self.convs):
            maps = F.leaky_relu(conv(maps), 0.1)
            if index >= 2:
                maps = self.attentions[index - 2](maps)
        return self.score(maps)


@MODELS.register_module()
class SKDHolisticLoss(KDLoss):
    """Holistic part of SKD (Liu et al., Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019).

    A discriminator ``D`` learns to score the teacher's logits high and the student's low, and the student learns to
    score high: its loss is ``-mean D(S)``, which may be negative and need not fall.  ``D`` minimises, with an
    optimizer of its own and after each step of the student,

    - 'wgan-gp': ``w_D (mean D(S) - mean D(T) + penalty_weight * mean (|dD/dX|_2 - 1)^2)``, where
      ``X = a T + (1 - a) S`` with one random ``a`` in 0..1 an image, and the gradient is that of the sum of an image's
      scores;
    - 'hinge': ``w_D (mean max(0, 1 + D(S)) + mean max(0, 1 - D(T)))``.

    ``D`` sees the image beside the logits, as in the paper (D(S | I)); the authors' code, and those that follow
    it, show the logits alone: ``condition_on_image=False``.  Architecture: :class:`Discriminator`.  Maps with a side
    below 64 are enlarged to 64 first.

    As published: 'wgan-gp' with SGD for D, ``loss_weight=0.1`` [C: SKD]; 'wgan-gp', ``loss_weight=0.001`` [C: IFVD];
    'hinge', Adam, ``loss_weight=0.001`` [C: CIRKD].  The published D moves its power iteration on in the student's
    forward too; here the student's loss changes no state.  The published backward pass of the spectral norm mixes the
    singular vectors of several calls; here each call keeps its own.

    Args:
        objective: 'wgan-gp' or 'hinge'. Default 'wgan-gp' [P].
        condition_on_image: whether D sees the image too. Default True [P]; False [C].
        width: channels of D's first convolution. Default 64 [C].
        optimizer: of D. Default ``dict(type='Adam', lr=4e-4, betas=(0.9, 0.99))`` [C: CIRKD]; SKD has
            ``dict(type='SGD', lr=4e-4, momentum=0.9, weight_decay=1e-4)`` [C]. Its rate follows the student's schedule.
        discriminator_weight: ``w_D``. Default 0.1 [C].
        penalty_weight: of the gradient penalty. Default 10 [C].
        mask_ignored: whether ignored pixels of both maps are set to 0 before D sees them. Default True; no published
            code does.
        loss_weight: see :class:`KDLoss`. Default 0.001 [C: IFVD, CIRKD].

    A region multiplies both maps before D sees them.  Images of which nothing is left do not count.

    Returns:
        Reduction: per level; mean over images
        The mean score with its sign changed; summed over levels.

    Raises:
        ValueError: an option has a bad value, or the batch has no images to condition on.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='SKDHolisticLoss', width=4))
        >>> student, teacher = torch.randn(2, 5, 64, 64, requires_grad=True), torch.randn(2, 5, 64, 64)
        >>> loss(student, teacher, KDBatch(images=torch.randn(2, 3, 128, 128))).backward()
        >>> [opponent.learn() is not None for opponent in loss.opponents()]
        [True]
    """

    takes = (4, )
    logits = True

    def __init__(self, objective: str = 'wgan-gp', condition_on_image: bool = True, width: int = 64,
                 optimizer: Optional[Mapping[str, Any]] = None, discriminator_weight: float = 0.1,
                 penalty_weight: float = 10.0, mask_ignored: bool = True, loss_weight: Any = 0.001):
        super().__init__(loss_weight)
        self.objective = one_of('SKDHolisticLoss', 'objective', objective, OBJECTIVES)
        self.width = whole('SKDHolisticLoss', 'width', width)
        self.discriminator_weight = positive('SKDHolisticLoss', 'discriminator_weight', discriminator_weight)
        self.penalty_weight = from_zero('SKDHolisticLoss', 'penalty_weight', penalty_weight)
        self.condition_on_image = boolean('SKDHolisticLoss', 'condition_on_image', condition_on_image)
        self.mask_ignored = boolean('SKDHolisticLoss', 'mask_ignored', mask_ignored)
        self.optimizer: Dict[str, Any] = dict(OPTIMIZER if optimizer is None else optimizer)
        try:
            make_optimizer([torch.zeros(1)], self.optimizer)  # whether there is such
        except ValueError as error:
            raise ValueError(f'SKDHolisticLoss: {error}') from error
        self.levels = nn.ModuleList()
        #: interpolation draws to use instead of random ones, (N, 1, 1, 1) (a golden vector's, for example).
        self.fixed_draws: Optional[Tensor] = None

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.levels) == 0:
            for tensor in teacher:
                channels = tensor.shape[1] + (3 if self.condition_on_image else 0)
                self.levels.append(Opponent(
                    Discriminator(channels, self.width, **parameter_options(tensor)), self.optimizer))

    def opponents(self) -> List[Opponent]:
        return list(self.levels)  # type: ignore[arg-type]

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        weights = labelled(student, batch, mask) if self.mask_ignored else mask
        size = (max(student.shape[2], SMALLEST), max(student.shape[3], SMALLEST))
        image = None
        if self.condition_on_image:
            image = F.adaptive_avg_pool2d(targets.images(batch).detach().to(student), size)
            if image.shape[1] != 3:
                raise ValueError(f'SKDHolisticLoss: images of {image.shape[1]} channels, and the discriminator takes '
                                 '3. Use condition_on_image=False')
        present = student.new_ones(student.shape[0])
        if weights is not None:
            weights = weights.to(student.dtype)
            present = (weights.flatten(1).amax(dim=1) > 0).to(student.dtype)
        judge: Any = functools.partial(self.scores, level, size, image, weights)
        if self.training and student.requires_grad:
            opponent: Any = self.levels[level]
            opponent.later(functools.partial(
                self.opponent_loss, judge, student.detach(), teacher, present, batch.info, level))
        return generator_loss(judge(student), present)

    def scores(self, level: int, size: Tuple[int, int], image: Optional[Tensor], weights: Optional[Tensor],
               maps: Tensor) -> Tensor:
        """What the discriminator of a level says to ``maps``."""
        shown = maps if weights is None else maps * weights
        shown = resize(shown, size)
        return self.levels[level](shown if image is None else torch.cat([shown, image], dim=1))

    def opponent_loss(self, judge: Any, student: Tensor, teacher: Tensor, present: Tensor,
                      info: StepInfo, level: int) -> Tensor:
        """What the discriminator minimises."""
        loss = discriminator_loss(self.objective, judge(student), judge(teacher), present)
        if self.objective == 'wgan-gp' and self.penalty_weight:
            loss = loss + self.penalty_weight * self.gradient_penalty(judge, student, teacher, present, info, level)
        return self.discriminator_weight * loss

    def gradient_penalty(self, judge: Any, student: Tensor, teacher: Tensor, present: Tensor,
                         info: StepInfo, level: int) -> Tensor:
        """``mean (|dD/dX|_2 - 1)^2`` over images, at random points between the two maps."""
        draws = self.fixed_draws
        if draws is None:
            draws = torch.rand(student.shape[0], 1, 1, 1, generator=info.generator(level), dtype=torch.float64)
        draws = draws.to(student)
        between = (draws * teacher + (1 - draws) * student).requires_grad_()
        gradient, = torch.autograd.grad(judge(between).sum(), between, create_graph=True)
        norm = safe_sqrt(gradient.flatten(1).square().sum(dim=1))
        return image_mean((norm - 1).square().view(-1, 1), present)
