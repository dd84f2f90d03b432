"""Boundary-privileged distillation."""

from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.losses.base.loss import KDLoss, needs_classes
from kd_mm.losses.cwd import channel_wise_divergence
from kd_mm.ops.blocks import BLOCK, sum_in_blocks
from kd_mm.ops.checks import boolean, from_zero, positive
from kd_mm.ops.divergences import softmax_divergence
from kd_mm.ops.functional import nonzero
from kd_mm.regions.edge import class_edges, label_edges, odd_width, window_classes
from kd_mm.registry import MODELS
from kd_mm.types.batch import Features, KDBatch
from kd_mm.types.targets import seg_map


@MODELS.register_module()
class BPKDLoss(KDLoss):
    """Boundary-privileged distillation (Liu et al., BPKD: Boundary Privileged Knowledge Distillation For Semantic
    Segmentation, WACV 2024).

    A re-implementation from the description: the authors published models, not the code that trains them, and their
    weights are not known to us.  On the class logits, with ``E_k`` the share of a cell at the edge of class k and
    ``B_k`` its labelled rest (see :func:`kd_mm.regions.edge.window_classes`)::

        tau^2 * (edge * mean over classes of [sum_i E_k(i) KL_i / sum_i E_k(i)]
                 + body * mean over images and classes of KL(p_k,t || p_k,s))

    ``KL_i`` is the divergence of the softmax over the classes at cell i: which class it is.  ``p_k`` is the
    distribution of class k over the cells, weighted by ``B_k``: its shape.  Classes without edge (or body) are left out
    of the mean.

    Args:
        edge: weight of the edges, not negative. Default 1, as :class:`SoftmaxKDLoss`; not tuned.
        body: weight of the bodies, not negative. Default 5, as :class:`CWDLoss`; not tuned.
        tau: temperature of both, above 0. Default 1.
        width: width of the window that finds edges, in pixels of the label map, odd. Default 7.
        standardise: mean and deviation of a cell's logits in the first term are made equal before the temperature, see
            :func:`kd_mm.ops.divergences.standardise_logits`. Default False.
        loss_weight: factor of both terms, see :class:`KDLoss`. Default 1.

    Pixels labelled as ignored belong to neither.  A region multiplies both shares.  For one of the terms alone, or
    another loss at the edges, use :class:`kd_mm.regions.edge.EdgeRegion`.

    Returns:
        Reduction: per level; mean over classes
        Reduction: per level; mean over channels
        Parts: edge, body
        The edges, then the bodies; summed over levels.

    Raises:
        ValueError: an option has a bad value, one class only with ``body=0``, the data has no segmentation map, or RoI
            rows.

    Example:
        >>> from kd_mm.registry import build
        >>> batch = KDBatch(seg_map=torch.randint(0, 5, (2, 32, 32)))
        >>> z = torch.randn(2, 5, 8, 8)
        >>> abs(build(dict(type='BPKDLoss'))(z, z, batch).item()) < 1e-5
        True
    """

    takes = (4, )
    logits = True
    needs_seg_map = True

    def __init__(self, edge: float = 1.0, body: float = 5.0, tau: float = 1.0, width: int = 7,
                 standardise: bool = False, loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        self.factors = {'edge': from_zero('BPKDLoss', 'edge', edge), 'body': from_zero('BPKDLoss', 'body', body)}
        self.tau = positive('BPKDLoss', 'tau', tau)
        self.width = odd_width('BPKDLoss', width)
        self.standardise = boolean('BPKDLoss', 'standardise', standardise)

    def check_shapes(self, student: Features, teacher: Features) -> None:
        super().check_shapes(student, teacher)
        if not self.factors['body']:
            needs_classes('BPKDLoss', student, self.standardise, 'Use body above 0 or SigmoidKDLoss')

    def terms(self, student: Tensor, teacher: Tensor, batch: KDBatch, mask: Optional[Tensor]) -> Dict[str, Tensor]:
        """The two terms without their weights: edge and body."""
        if student.dim() != 4:
            raise ValueError(f'BPKDLoss needs maps (N, K, H, W), not {tuple(student.shape)}')
        labels, size = seg_map(batch).to(student.device), (student.shape[2], student.shape[3])
        mixed, known = label_edges(labels, self.width, batch.targets.ignore_index)
        sets = window_classes(labels, mixed, student.shape[1], self.width)
        whole = F.adaptive_avg_pool2d(known.float(), size).to(student.dtype)
        weights = torch.ones_like(whole) if mask is None else mask.to(student.dtype)
        classes, images = (torch.arange(student.shape[dim], device=student.device) for dim in (1, 0))

        # The mean over the classes of their means over their edges is a sum over cells with one weight each, so that
        # the shares of all classes are never held at once.
        edges, found = torch.zeros_like(whole), whole.new_zeros(())
        for part in classes.split(max(BLOCK // max(student[:, 0].numel(), 1), 1)):
            shares = class_edges(sets, part, size).to(student.dtype) * weights
            sizes = shares.sum(dim=(0, 2, 3), keepdim=True)
            edges += (shares / nonzero(sizes)).sum(dim=1, keepdim=True)
            found += (sizes > 0).sum()

        def edge_sum(one: Tensor, other: Tensor, shares: Tensor) -> Tuple[Tensor]:
            return ((softmax_divergence(one, other, self.tau, standardise=self.standardise).sum(
                dim=1, keepdim=True) * shares).sum(), )

        def body_sums(one: Tensor, other: Tensor, kinds: Tensor, rows: Tensor, factors: Tensor,
                      labelled: Tensor) -> Tuple[Tensor, Tensor]:
            rows, kinds = rows.flatten(), kinds.flatten()
            bodies = labelled - class_edges(sets[rows], kinds, size).to(one.dtype)
            bodies = bodies.clamp(min=0) * factors
            return (channel_wise_divergence(one, other, self.tau, mask=bodies).sum(),
                    (bodies > 0).flatten(2).any(dim=2).sum())

        edge, = sum_in_blocks(edge_sum, 'cells', student, teacher, edges)
        body, filled = sum_in_blocks(body_sums, 'channels', student, teacher, classes.view(1, -1, 1, 1),
                                     images.view(-1, 1, 1, 1), weights, whole)
        return {'edge': self.tau**2 * edge / found.clamp(min=1), 'body': self.tau**2 * body / filled.clamp(min=1)}

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Dict[str, Tensor]:
        return self.terms(student, teacher, batch, mask)
