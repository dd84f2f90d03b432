"""Knowledge adaptation: an auto-encoder's code of the teacher's features, and the affinities of their cells."""

from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_mm.losses.base.learner import Learner, load_learned, read_learned
from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.checks import from_zero, one_of, whole
from kd_mm.ops.functional import nonzero, parameter_options, resize, safe_sqrt, unit_vectors
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch

AFFINITIES = ('cell', 'channel')


def adaptation_distance(student: Tensor, teacher: Tensor, p: int = 1) -> Tensor:
    """Distance of two codes, each divided by its length over channels and cells.

    p = 1: the mean of the absolute differences over all elements.  p = 2: the length of the difference, averaged over
    the images.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        p: 1 or 2.

    Example:
        >>> adaptation_distance(torch.ones(1, 1, 2, 2), -torch.ones(1, 1, 2, 2), p=2)
        tensor(2.)
    """
    gap = unit_vectors(student.flatten(1)) - unit_vectors(teacher.flatten(1))
    return gap.abs().mean() if p == 1 else safe_sqrt(gap.square().sum(dim=1)).mean()


def cell_affinity_distance(student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Root mean square difference of the cosines between all pairs of cells of an image, averaged over the images.

    ``|A_s - A_t|_F / (H*W)``, ``A_ij`` the cosine over channels of cells i and j.  The (H*W)^2 matrices are never
    made: with unit rows S and T the squared norm is ``|S'S|^2 + |T'T|^2 - 2 |S'T|^2``, of matrices C x C.

    Args:
        student: (N, C, H, W).
        teacher: (N, Ct, H, W).
        mask: weights of the cells (N, 1, H, W), which multiply both cells of a pair.

    Example:
        >>> x = torch.randn(1, 4, 3, 3)
        >>> cell_affinity_distance(x, 2 * x).item() < 1e-3
        True
    """
    rows_s, rows_t = (unit_vectors(part.flatten(2), dim=1) for part in (student, teacher))
    cells: Any = float(rows_s.shape[2])
    if mask is not None:
        weights = mask.to(rows_s.dtype).flatten(2)
        rows_s, rows_t, cells = rows_s * weights, rows_t * weights, nonzero(weights.sum(dim=(1, 2)))
    squares = [torch.bmm(first, second.transpose(1, 2)).square().sum(dim=(1, 2))
               for first, second in ((rows_s, rows_s), (rows_t, rows_t), (rows_s, rows_t))]
    return (safe_sqrt((squares[0] + squares[1] - 2 * squares[2]).clamp(min=0)) / cells).mean()


def channel_affinity_distance(student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """The affinity of torchdistill: for each channel ``|s s' - t t'|_F / (H*W)``, summed, averaged over the images.

    ``s`` and ``t`` are the channel over space, divided by its length; the norm is
    ``sqrt(2 (1 - (s . t)^2)) = |s - t| sqrt(1 + s . t)``.

    Args: as :func:`cell_affinity_distance`, with equal channels.

    Example:
        >>> x = torch.randn(1, 4, 3, 3)
        >>> channel_affinity_distance(x, 2 * x).item() < 1e-3
        True
    """
    cells: Any = float(student[0, 0].numel())
    if mask is not None:
        mask = mask.to(student.dtype)
        student, teacher, cells = student * mask, teacher * mask, nonzero(mask.sum(dim=(1, 2, 3)))[:, None]
    student, teacher = (unit_vectors(part.flatten(2), dim=2) for part in (student, teacher))
    gap, inner = (student - teacher).square().sum(dim=2), (student * teacher).sum(dim=2)
    return (safe_sqrt(gap * (1 + inner)) / cells).sum(dim=1).mean()


class AutoEncoder(nn.Module):
    """``encoder``: conv 3x3 (stride) - ReLU - conv 3x3 to the code; ``decoder``: conv 3x3 - ReLU, to size, conv 3x3."""

    def __init__(self, channels: int, code: int, stride: int, **options: Any):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(channels, code, 3, stride, 1, **options), nn.ReLU(),
                                     nn.Conv2d(code, code, 3, padding=1, **options))
        self.decoder: nn.Module = nn.ModuleList([nn.Conv2d(code, code, 3, padding=1, **options),
                                                 nn.Conv2d(code, channels, 3, padding=1, **options)])

    def decode(self, code: Tensor, size: Tuple[int, int]) -> Tensor:
        layers: Any = self.decoder
        return layers[1](resize(layers[0](code).relu(), size))


class CodeLearner(Learner):
    """First stage: an auto-encoder of the teacher's features, ``mean((D(E(F)) - F)^2) + sparsity * sum |E(F)| / N``."""

    task_loss = False
    lr, iters = 1e-3, 2000

    def __init__(self, code: int, stride: int, sparsity: float):
        super().__init__()
        self.code, self.stride, self.sparsity = code, stride, sparsity
        self.levels = nn.ModuleList()

    def prepare(self, teacher: Features) -> None:
        if len(self.levels) == 0:
            for tensor in teacher:
                self.levels.append(AutoEncoder(tensor.shape[1], self.code, self.stride, **parameter_options(tensor)))

    def forward(self, level: int, teacher: Tensor) -> Tuple[Tensor, Tensor]:
        module: Any = self.levels[level]
        code = module.encoder(teacher)
        rebuilt = module.decode(code, (teacher.shape[2], teacher.shape[3]))
        sparse = code.abs().sum() / max(teacher.shape[0], 1)
        return rebuilt, F.mse_loss(rebuilt, teacher) + self.sparsity * sparse


@MODELS.register_module()
class KTAADLoss(KDLoss):
    """Knowledge translation and adaptation with affinity distillation (He et al., Knowledge Adaptation for Efficient
    Semantic Segmentation, CVPR 2019).

    ``kta_weight * |A(F_s)' - E(F_t)'|_p + affinity_weight * affinity(B(F_s), E(F_t))``: ``E`` is the encoder of an
    auto-encoder that was trained on the teacher's features, ``A`` and ``B`` are convolutions 3x3 of the student to the
    code, trained jointly, and ' is division by the length over channels and cells.  See :func:`adaptation_distance` and
    :func:`cell_affinity_distance`.

    A re-implementation from the description, with the distances of torchdistill (a third party; the authors' code is
    not known to us): ``affinity='channel', p=1`` are torchdistill's, whose affinity is one for each channel over space
    instead of one for each pair of cells.  Layers and sizes of auto-encoder and adapters are ours.

    The auto-encoder is learned first: ``python tools/learn_tokens.py CONFIG`` (both stages: ``--train``).

    Args:
        autoencoder: file that ``tools/learn_tokens.py`` wrote (or writes), a state dict, or ``'random'`` (tests).
        code: channels of the code. Default 256.
        stride: of the encoder and of both adapters. Default 2.
        kta_weight: Default 50 [C: torchdistill].
        affinity_weight: Default 1 [C: torchdistill].
        p: 1 or 2. Default 1 [C: torchdistill]; 2 in the paper [recalled].
        affinity: 'cell' (the paper's) or 'channel' (torchdistill's). Default 'cell'.
        sparsity: weight of the code's absolute sum when the auto-encoder is trained. Default 1e-7 [C: torchdistill].
        loss_weight: factor of both terms, see :class:`KDLoss`. Default 1.

    A region, averaged to the size of the code, weights the cells of both codes before they are compared.

    Returns:
        Reduction: per level; mean over elements
        Reduction: per level; mean over images
        Parts: kta, affinity
        Adaptation, then affinity, by default; summed over levels.

    Raises:
        ValueError: without an auto-encoder, or with one of another teacher; an option has a bad value.

    Example:
        >>> from kd_mm.registry import build
        >>> loss = build(dict(type='KTAADLoss', autoencoder='random', code=8))
        >>> loss(torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)) > 0
        tensor(True)
    """

    takes = (4, )
    same_channels = False
    same_size = False
    learned = 'autoencoder'

    def __init__(self, autoencoder: Any = None, code: int = 256, stride: int = 2, kta_weight: float = 50.0,
                 affinity_weight: float = 1.0, p: int = 1, affinity: str = 'cell', sparsity: float = 1e-7,
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.code, self.stride = whole('KTAADLoss', 'code', code), whole('KTAADLoss', 'stride', stride)
        self.sparsity = from_zero('KTAADLoss', 'sparsity', sparsity)
        self.factors = {'kta': from_zero('KTAADLoss', 'kta_weight', kta_weight),
                        'affinity': from_zero('KTAADLoss', 'affinity_weight', affinity_weight)}
        self.p = one_of('KTAADLoss', 'p', p, (1, 2))
        self.affinity = one_of('KTAADLoss', 'affinity', affinity, AFFINITIES)
        self.given = read_learned('KTAADLoss', 'autoencoder', autoencoder)
        self.coder = self.learner()
        self.feature_adapters, self.affinity_adapters = nn.ModuleList(), nn.ModuleList()

    def learner(self) -> CodeLearner:
        return CodeLearner(self.code, self.stride, self.sparsity)

    def prepare(self, student: Features, teacher: Features) -> None:
        if len(self.coder.levels) > 0:
            return
        self.coder.prepare(teacher)
        load_learned('KTAADLoss', 'autoencoder', self.coder, self.given)
        for module in self.coder.levels:
            module.decoder = nn.Identity()  # has done its work
        for tensor in student:
            for adapters in (self.feature_adapters, self.affinity_adapters):
                adapters.append(nn.Conv2d(tensor.shape[1], self.code, 3, self.stride, 1, **parameter_options(tensor)))

    def terms(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
              mask: Optional[Tensor] = None) -> Dict[str, Tensor]:
        """The two terms of one level without their weights: kta and affinity."""
        module: Any = self.coder.levels[level]
        code = module.encoder(teacher).detach()
        size = (code.shape[2], code.shape[3])
        adapted, related = (resize(adapters[level](student), size)
                            for adapters in (self.feature_adapters, self.affinity_adapters))
        distance = cell_affinity_distance if self.affinity == 'cell' else channel_affinity_distance
        shown = code
        if mask is not None:
            mask = F.adaptive_avg_pool2d(mask.to(code.dtype), size)
            adapted, shown = adapted * mask, code * mask
        return {'kta': adaptation_distance(adapted, shown, self.p), 'affinity': distance(related, code, mask)}

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        return self.terms(level, student, teacher, batch, mask)
