"""Boundary-privileged distillation."""

from typing import Any, Dict, Optional

from torch import Tensor

from kd_mm.functional import nonzero, positive
from kd_mm.losses.base import KDLoss
from kd_mm.losses.cwd import channel_wise_divergence
from kd_mm.losses.kd import softmax_divergence
from kd_mm.regions.edge import class_edges, odd_width
from kd_mm.registry import MODELS
from kd_mm.types import KDBatch


@MODELS.register_module()
class BPKDLoss(KDLoss):
    """Boundary-privileged distillation (Liu et al., BPKD: Boundary Privileged Knowledge Distillation For Semantic
    Segmentation, WACV 2024).

    A re-implementation from the description: the authors published models, not the code that trains them, and their
    weights are not known to us.  On the class logits, with ``E_k`` the share of a cell at the edge of class k and
    ``B_k`` its labelled rest (see :func:`kd_mm.regions.edge.class_edges`)::

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
        loss_weight: factor of both terms, see :class:`KDLoss`. Default 1.

    Pixels labelled as ignored belong to neither.  A region multiplies both shares.  For one of the terms alone, or
    another loss at the edges, use :class:`kd_mm.regions.EdgeRegion`.

    Returns:
        A scalar per level; summed over levels.

    Raises:
        ValueError: an option has a bad value, the data has no segmentation map, or RoI rows.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> batch = KDBatch(seg_map=torch.randint(0, 5, (2, 32, 32)))
        >>> z = torch.randn(2, 5, 8, 8)
        >>> build(dict(type='BPKDLoss'))(z, z, batch).item()
        0.0
    """

    logits = True
    needs_seg_map = True

    def __init__(self, edge: float = 1.0, body: float = 5.0, tau: float = 1.0, width: int = 7,
                 loss_weight: Any = 1.0):
        super().__init__(loss_weight)
        for name, value in (('edge', edge), ('body', body)):
            if not value >= 0:
                raise ValueError(f'BPKDLoss: {name}={value!r} must not be negative')
        self.edge, self.body = edge, body
        self.tau = positive('BPKDLoss', 'tau', tau)
        self.width = odd_width('BPKDLoss', width)

    def terms(self, student: Tensor, teacher: Tensor, batch: KDBatch, mask: Optional[Tensor]) -> Dict[str, Tensor]:
        """The two terms without their weights: edge and body."""
        if student.dim() != 4:
            raise ValueError(f'BPKDLoss needs maps (N, K, H, W), not {tuple(student.shape)}')
        edges, bodies = class_edges(batch, student, student.shape[1], self.width)
        if mask is not None:
            edges, bodies = edges * mask.to(edges.dtype), bodies * mask.to(bodies.dtype)
        pixels = softmax_divergence(student, teacher, self.tau).sum(dim=1, keepdim=True)
        sizes = edges.sum(dim=(0, 2, 3))
        edge = (pixels * edges).sum(dim=(0, 2, 3)) / nonzero(sizes)
        body = channel_wise_divergence(student, teacher, self.tau, mask=bodies)
        filled = (bodies > 0).flatten(2).any(dim=2).sum().clamp(min=1)
        return {'edge': self.tau**2 * edge.sum() / (sizes > 0).sum().clamp(min=1),
                'body': self.tau**2 * body.sum() / filled}

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        terms = self.terms(student, teacher, batch, mask)
        return self.edge * terms['edge'] + self.body * terms['body']
