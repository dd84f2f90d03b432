"""Factor transfer."""

from typing import Any, Dict, Optional

from torch import Tensor, nn

from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import boolean, from_zero, one_of, positive, whole
from kd_mm.ops.functional import apply_weights, nonzero, parameter_options, safe_sqrt, unit_norm
from kd_mm.ops.norms import BatchNorm
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch

NORMS = (1, 2)


def three_layers(channels: int, middle: int, out: int, norm: bool, transposed: bool = False,
                 last: bool = True, **options: Any) -> nn.Sequential:
    """Three 3x3 convolutions with LeakyReLU(0.1), and batch normalisation (of the batch's statistics) if asked for.

    Args:
        channels: of the input.
        middle: of the output of the first layer.
        out: of the second and third layer.
        norm: batch normalisation before each activation.
        transposed: with transposed convolutions.
        last: whether the last layer has an activation.
        options: device and dtype of the parameters.
    """
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    layers = []
    for index, (wide, narrow) in enumerate(((channels, middle), (middle, out), (out, out))):
        layers += [make(wide, narrow, 3, padding=1, **options),
                   BatchNorm(narrow, track_running_stats=False, **options) if norm else nn.Identity(),
                   nn.LeakyReLU(0.1) if last or index < 2 else nn.Identity()]
    return nn.Sequential(*layers)


def factor_gap(student: Tensor, teacher: Tensor, p: int, mask: Optional[Tensor] = None) -> Tensor:
    """Distance of two factors, each an L2 unit vector for every image.

    ``p=1``: mean of the absolute differences over all elements; ``p=2``: L2 norm of the difference, at most 2, mean
    over the images.  With a mask the factors are multiplied by it before they are normalised, and the means are over
    its cells and over the images that have any.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 3, 4, 4)
        >>> factor_gap(x, 5 * x, 2).item() < 1e-5, round(factor_gap(x, -x, 2).item(), 4)
        (True, 2.0)
    """
    gap = unit_norm(apply_weights(student, mask)) - unit_norm(apply_weights(teacher, mask))
    if p == 1:
        cells: Any = gap[:, 0].numel() if mask is None else nonzero((mask > 0).sum())
        return gap.abs().sum() / (max(cells, 1) * gap.shape[1] if mask is None else cells * gap.shape[1])
    images: Any = max(gap.shape[0], 1) if mask is None else nonzero((mask > 0).flatten(1).any(dim=1).sum())
    return safe_sqrt(gap.square().flatten(1).sum(dim=1)).sum() / images


def relative_error(rebuilt: Tensor, target: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """``sum (rebuilt - target)^2 / sum target^2``, both weighted by the region: 1 when nothing is rebuilt.

    Example:
        >>> import torch
        >>> relative_error(torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3))
        tensor(1.)
    """
    return (apply_weights((rebuilt - target).square(), mask).sum()
            / nonzero(apply_weights(target.square(), mask).sum()))


@MODELS.register_module()
class FTLoss(KDLoss):
    """Factor transfer (Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS
    2018).

    A *paraphraser* compresses the teacher's map to a *factor*, a *translator* makes a factor of the student's, and the
    two are compared as unit vectors, one an image: ``mean_n || f_s / |f_s| - f_t / |f_t| ||_p``.  Both are three 3x3
    convolutions with LeakyReLU(0.1), the translator with batch normalisation.

    The paraphraser must know what to keep: with a decoder (three transposed convolutions, the last one linear, because
    features may be negative) it is trained to rebuild the teacher's map, by the squared error relative to the squared
    teacher.  The factor term never trains it (it would make both factors constant).  Three ways:

    - ``reconstruction_weight=1`` (default): jointly with the student, from the first step to the last.
    - ``pretrain_steps=k`` as well: in the first k steps the paraphraser is trained alone, and the student gets nothing
      from this loss. That is the published pre-training within one run; it goes on learning afterwards, where the paper
      freezes it.
    - ``reconstruction_weight=0``: never; there is no decoder, and its weights are what was loaded, or random.

    As published: mmrazor is ``p=1, reconstruction_weight=0`` in its second phase; torchdistill has ``p=1`` with weight
    1000, and ``p=2``. ``p=1`` is a mean over elements of unit vectors, so it shrinks as 1 / sqrt(C * H * W).  In both
    codes the decoder's last layer has an activation too.

    Args:
        factor_ratio: channels of the factor divided by those of the teacher, above 0. Default 0.5 [C: mmrazor,
            torchdistill].
        p: 1 or 2, the norm of the difference. Default 2, whose size depends on nothing.
        translator_norm: batch normalisation in the translator. Default True [C: mmrazor]; False in torchdistill.
        paraphraser_norm: the same in the paraphraser. Default False [C].
        reconstruction_weight: of the rebuilding term beside the factor term, inside ``loss_weight``. Default 1.
        pretrain_steps: steps at the start that train the paraphraser alone. Default 0.
        loss_weight: see :class:`KDLoss`. Default 1 [C: mmrazor, with p=1].

    Norms are of the batch's own statistics; there are no running ones.  A region multiplies the factors before they are
    normalised, and weights the rebuilding error.

    Returns:
        Reduction: per level; mean over images
        Parts: factor, reconstruction
        The factor term (0..2 for p=2) and the rebuilding term (about 0..1); summed over levels.

    Raises:
        ValueError: an option has a bad value, or there are pre-training steps and nothing to train.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='FTLoss'))
        >>> loss(torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)).shape
        torch.Size([])
    """

    takes = (4, )
    same_channels = False

    def __init__(self, factor_ratio: float = 0.5, p: int = 2, translator_norm: bool = True,
                 paraphraser_norm: bool = False, reconstruction_weight: float = 1.0, pretrain_steps: int = 0,
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.factor_ratio = positive('FTLoss', 'factor_ratio', factor_ratio)
        self.factors = {'reconstruction': from_zero('FTLoss', 'reconstruction_weight', reconstruction_weight)}
        self.pretrain_steps = whole('FTLoss', 'pretrain_steps', pretrain_steps, 0)
        if self.pretrain_steps and not self.factors['reconstruction']:
            raise ValueError(f'FTLoss: pretrain_steps={pretrain_steps} train the paraphraser, and '
                             'reconstruction_weight=0 leaves it untrained')
        self.p = one_of('FTLoss', 'p', p, NORMS)
        self.translator_norm = boolean('FTLoss', 'translator_norm', translator_norm)
        self.paraphraser_norm = boolean('FTLoss', 'paraphraser_norm', paraphraser_norm)
        self.translators = nn.ModuleList()
        self.paraphrasers = nn.ModuleList()
        self.decoders = nn.ModuleList()

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.translators) > 0:
            return
        for s, t in zip(student, teacher):
            options, wide = parameter_options(s), t.shape[1]
            factor = max(round(wide * self.factor_ratio), 1)
            self.translators.append(three_layers(s.shape[1], s.shape[1], factor, self.translator_norm, **options))
            self.paraphrasers.append(three_layers(wide, wide, factor, self.paraphraser_norm, **options))
            if self.factors['reconstruction']:
                self.decoders.append(three_layers(factor, factor, wide, self.paraphraser_norm, transposed=True,
                                                  last=False, **options))

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        factor = self.paraphrasers[level](teacher)
        gap = factor_gap(self.translators[level](student), factor.detach(), self.p, mask)
        if not self.factors['reconstruction']:
            return {'factor': gap}
        return {'factor': gap * float(batch.info.step >= self.pretrain_steps),
                'reconstruction': relative_error(self.decoders[level](factor), teacher, mask)}
