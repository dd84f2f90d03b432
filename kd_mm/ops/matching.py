"""One-to-one matching of queries."""

import torch
from torch import Tensor

from kd_mm.ops.boxes import giou_loss, to_corners


def pair_costs(boxes: Tensor, others: Tensor, l1_weight: float, giou_weight: float) -> Tensor:
    """``l1_weight * L1 - giou_weight * GIoU`` of every pair of boxes.

    Args:
        boxes: (..., Q, 4), (cx, cy, w, h) in 0..1.
        others: (..., T, 4).

    Returns:
        (..., Q, T).

    Example:
        >>> box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
        >>> round(pair_costs(box, box, 5.0, 2.0).item(), 4)
        -2.0
    """
    # GIoU is a ratio of areas: the same in pixels.
    near = giou_loss(to_corners(boxes)[..., :, None, :], to_corners(others)[..., None, :, :], eps=1e-12)
    return l1_weight * torch.cdist(boxes, others, p=1) + giou_weight * (near - 1)


def hungarian(costs: Tensor) -> Tensor:
    """The one-to-one matching of least total cost.

    Args:
        costs: (..., Q, T).

    Returns:
        (..., Q), the column of each row, -1 for the rows that are left over (Q > T).

    Raises:
        ImportError: scipy is missing; mmdet's own assigner needs it too.

    Example:
        >>> hungarian(torch.tensor([[1., 0.], [0., 9.], [5., 5.]]))
        tensor([ 1,  0, -1])
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError('the matching of queries needs scipy: pip install scipy') from error
    # One transfer for all layers and images. A cost that is not finite says nothing about the best partner; the loss
    # that it leads to is not finite either and is reported as such.
    flat = torch.nan_to_num(costs.detach(), nan=1e4, posinf=1e4, neginf=-1e4).reshape(-1, *costs.shape[-2:]).cpu()
    result = torch.full(flat.shape[:2], -1, dtype=torch.long)
    for index, matrix in enumerate(flat.numpy()):
        rows, columns = linear_sum_assignment(matrix)
        result[index, torch.from_numpy(rows)] = torch.from_numpy(columns)
    return result.view(costs.shape[:-1]).to(costs.device)


def take_queries(values: Tensor, chosen: Tensor) -> Tensor:
    """Rows of (L, N, T, D) by index: (L, N, Q, D); index -1 gives the first row, to be discarded.

    Example:
        >>> take_queries(torch.tensor([[[[1.], [2.]]]]), torch.tensor([[[1, 0, -1]]])).flatten()
        tensor([2., 1., 1.])
    """
    return values.gather(2, chosen.clamp(min=0)[..., None].expand(*chosen.shape, values.shape[-1]))
