"""Sums over cells, channels or pairs of cells that never hold all their terms at once."""

from typing import Any, Callable, Iterator, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_mm.ops.checks import one_of

ALONG = ('cells', 'channels', 'images')

#: largest number of a side's values in one block of a sum, 4 MiB in float32.
BLOCK = 2**20

Block = Tuple[slice, ...]


def _spans(length: int, step: int) -> Iterator[slice]:
    for start in range(0, max(length, 1), max(step, 1)):
        yield slice(start, start + max(step, 1))


def block_slices(shape: Tuple[int, ...], along: str, max_block: int) -> Iterator[Block]:
    """How to cut a tensor into blocks: slices of its first dimensions.

    Whole images (or rows) as many as fit; where not even one does, parts of an image: rows of cells, or channels.

    Args:
        shape: (N, C, H, W), or (M, K) for rows.
        along: what must stay together: with 'cells' the channels of a cell, with 'channels' the cells of a channel,
            with 'images' everything of an image.
        max_block: largest number of values of a block, if the smallest part has no more.

    Example:
        >>> [torch.ones(2, 3, 4, 5)[block].shape[:2] for block in block_slices((2, 3, 4, 5), 'channels', 40)]
        [torch.Size([1, 2]), torch.Size([1, 1]), torch.Size([1, 2]), torch.Size([1, 1])]
    """
    count, channels = shape[0], shape[1]
    cells = shape[2] * shape[3] if len(shape) == 4 else 1
    each = max(channels * cells, 1)
    if each <= max_block or along == 'images' or len(shape) == 2:
        for images in _spans(count, max_block // each):
            yield (images, )
        return
    for image in _spans(count, 1):
        if along == 'channels':
            for part in _spans(channels, max_block // cells):
                yield image, part
        else:
            for part in _spans(shape[2], max_block // (channels * shape[3])):
                yield image, slice(None), part


def _cut(tensor: Optional[Tensor], block: Block, shape: Tuple[int, ...]) -> Optional[Tensor]:
    """The block of a tensor that may be broadcast to ``shape``."""
    if tensor is None:
        return None
    return tensor[tuple(part if tensor.shape[at] == shape[at] else slice(None) for at, part in enumerate(block))]


class _BlockSum(torch.autograd.Function):
    """Keeps its inputs alone and computes each block a second time on the way back."""

    @staticmethod
    def forward(ctx: Any, function: Any, blocks: Any, student: Tensor, *others: Optional[Tensor]) -> Any:
        ctx.function, ctx.blocks = function, blocks
        ctx.save_for_backward(student, *others)
        totals: Any = None
        for block in blocks:
            parts = function(*(_cut(tensor, block, student.shape) for tensor in (student, *others)))
            totals = parts if totals is None else tuple(map(torch.add, totals, parts))
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:
        student, *others = ctx.saved_tensors
        grad = torch.empty_like(student)
        for block in ctx.blocks:
            part = _cut(student, block, student.shape)
            assert part is not None
            part = part.detach().requires_grad_()
            # Recompute with autocast off, as in the forward pass, even if backward() is called inside an autocast.
            with torch.enable_grad(), torch.autocast(student.device.type, enabled=False):
                parts = ctx.function(part, *(_cut(tensor, block, student.shape) for tensor in others))
                # A count among the sums has no gradient.
                sloped = [index for index, total in enumerate(parts) if total.requires_grad]
                slope, = torch.autograd.grad([parts[index] for index in sloped], part,
                                             [upstream[index] for index in sloped])
            grad[block] = slope
        return (None, None, grad, *(None for _ in others))


def sum_in_blocks(function: Callable[..., Tuple[Tensor, ...]], along: str, student: Tensor, *others: Optional[Tensor],
                  max_block: Optional[int] = None) -> Tuple[Tensor, ...]:
    """Sum of ``function(block of student, blocks of others)`` over blocks, with no more memory than a block needs.

    A loss on class logits written with autograd keeps five to ten tensors of the size of the logits from its forward
    to its backward.  This keeps none: blocks are computed again when the gradient is asked for, and the gradient of
    ``student`` is the only tensor of its size.

    Args:
        function: gets tensors of one block, in the order given here, and returns a tuple of sums over the block, of
            shapes that do not depend on the block. It is called twice, and no gradient reaches what it uses besides
            its arguments.
        along: see :func:`block_slices`.
        student: (N, C, H, W) or (M, K).
        others: tensors that can be broadcast to the shape of ``student``, of the same number of dimensions, or None; no
            gradient reaches them.
        max_block: largest number of values of ``student`` in a block. Default 2**20.

    Returns:
        What ``function`` returns, summed over the blocks; differentiable once.

    Raises:
        ValueError: ``along`` is not among its choices.

    Example:
        >>> x = torch.arange(4.).view(1, 1, 2, 2).requires_grad_()
        >>> total, = sum_in_blocks(lambda s, t: ((s * t).square().sum(), ), 'cells', x, torch.ones(1, 1, 1, 1))
        >>> total.backward(); total.item(), x.grad.flatten()
        (14.0, tensor([0., 2., 4., 6.]))
    """
    one_of('sum_in_blocks', 'along', along, ALONG)
    blocks = tuple(block_slices(tuple(student.shape), along, max_block or BLOCK))
    return _BlockSum.apply(function, blocks, student, *others)


def _softmax(scores: Tensor) -> Tuple[Tensor, Tensor]:
    """Softmax of rows (A, B) and the logarithms (A) of its divisors, found from its largest entries without a second
    exponential."""
    p = scores.softmax(dim=1)
    return p, scores.amax(dim=1) - p.amax(dim=1).log()


class _RelationDivergence(torch.autograd.Function):
    """The gradient is computed together with the value, block by block, so that no block has to be kept or repeated."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, student_keys: Tensor, teacher: Tensor, teacher_keys: Tensor,
                weights: Tensor, bonus: Optional[Tensor], tau: float, rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = student.new_zeros(())
        grad = torch.zeros_like(student) if wanted else None
        grad_keys = torch.zeros_like(student_keys) if wanted else None
        for start in range(0, student.shape[0], rows):
            block = slice(start, start + rows)
            rows_s, rows_t = student[block] / tau, teacher[block] / tau
            for group in range(student_keys.shape[0]):
                scores_s, scores_t = rows_s @ student_keys[group].T, rows_t @ teacher_keys[group].T
                if bonus is not None:
                    scores_s, scores_t = scores_s.add_(bonus[group]), scores_t.add_(bonus[group])
                p_s, log_sum_s = _softmax(scores_s)
                p_t, log_sum_t = _softmax(scores_t)
                # A product of 1xB and Bx1 for each row: the elementwise product is not written anywhere.
                gap = (p_t[:, None] @ scores_t.sub_(scores_s)[:, :, None]).flatten()
                weight = weights[block, group]
                total += (gap + (log_sum_s - log_sum_t)) @ weight
                if grad is not None and grad_keys is not None:
                    slope = p_s.sub_(p_t)
                    weight = weight[:, None] / tau
                    grad[block] += (slope @ student_keys[group]) * weight
                    grad_keys[group] += slope.T @ (student[block] * weight)
        if grad is not None and grad_keys is not None:
            ctx.save_for_backward(grad, grad_keys)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Tuple[Optional[Tensor], ...]:
        grad, grad_keys = ctx.saved_tensors
        return (upstream[0] * grad, upstream[0] * grad_keys, None, None, None, None, None, None)


def relation_divergence(student: Tensor, student_keys: Tensor, teacher: Tensor, teacher_keys: Tensor,
                        weights: Tensor, tau: float, key_weights: Optional[Tensor] = None,
                        max_block: Optional[int] = None) -> Tensor:
    """Divergence between the relations of rows to keys, student against teacher, without ever holding all relations.

    ``sum_{a,g} w[a, g] * KL(p_t[a, g] || p_s[a, g])`` with ``p[a, g]`` the softmax over the B keys of group g of
    ``row_a . key_b / tau``.  Rows are taken in blocks; values do not depend on the size of a block but for rounding.

    Args:
        student: rows (A, Cs).
        student_keys: (G, B, Cs); they may need a gradient too.
        teacher: rows (A, Ct), no gradient.
        teacher_keys: (G, B, Ct), no gradient.
        weights: (A, G).
        tau: temperature, above 0.
        key_weights: (G, B), not negative: ``p`` is proportional to them; a group of zeros alone must have weights 0.
        max_block: largest number of similarities of one matrix at a time; four of them exist. Default None: 2**23, or
            2**20 on a CPU, 4 MiB in float32, for its caches.

    Returns:
        A scalar; differentiable once.

    Example:
        >>> x = torch.randn(6, 4)
        >>> relation_divergence(x, x[None], 2 * x, 2 * x[None], torch.ones(6, 1), 1.0) > 0
        tensor(True)
    """
    bonus = None
    if key_weights is not None:
        inside = key_weights > 0
        # A finite stand-in for -inf: the difference of two -inf would be NaN.
        bonus = torch.where(inside, key_weights, torch.ones_like(key_weights)).log().masked_fill(~inside, -1e30)
    if max_block is None:
        max_block = 2**20 if student.device.type == 'cpu' else 2**23
    rows = max(max_block // max(student_keys.shape[1], 1), 1)
    return _RelationDivergence.apply(student, student_keys, teacher.detach(), teacher_keys.detach(), weights.detach(),
                                     bonus, tau, rows)
