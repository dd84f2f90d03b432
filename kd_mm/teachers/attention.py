"""Attention whose weights nobody looks at: torch's fused kernel, and projections of rows that lie one after the other.

``torch.nn.MultiheadAttention`` wants the tokens in front, (L, N, E), and the hosts give it a transposed view of (N, L,
E); its linear layers then run as N-row products, one for each token.  Here they run on the tokens as they lie.
"""

from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from kd_mm.ops.modes import autocast_dtype
from kd_mm.teachers import kernels


def without_weights(module: nn.MultiheadAttention, original: Any, direct: bool) -> Any:
    """The forward of an attention that does not make what nobody looks at.

    Args:
        module: the attention.
        original: its own forward.
        direct: the projections run by :mod:`kd_mm.teachers.kernels`.
    """
    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 4:  # need_weights is the fifth argument
            return original(*args, **kwargs)
        if direct and _plain(module, args, kwargs):
            return _attend(module, *_inputs(args, kwargs)), None
        return original(*args, **{**kwargs, 'need_weights': False})

    return forward


def _inputs(args: Any, kwargs: Any) -> Any:
    given = dict(zip(('query', 'key', 'value'), args), **kwargs)
    return [given.get(name) for name in ('query', 'key', 'value')]


def _plain(module: nn.MultiheadAttention, args: Any, kwargs: Any) -> bool:
    """Whether this is attention without any mask between tokens of the module's own width, on a CPU, in float32 or in
    the precision around."""
    inputs = _inputs(args, kwargs)
    masks = list(args[3:]) + [kwargs.get(name) for name in ('attn_mask', 'key_padding_mask')]
    return (kernels.available() and not module.training
            and module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
            and not any(mask is not None for mask in masks) and not kwargs.get('is_causal')
            and all(isinstance(tensor, Tensor) and tensor.dim() == 3 and tensor.device.type == 'cpu' and tensor.numel()
                    and tensor.dtype in (torch.float32, autocast_dtype('cpu')) for tensor in inputs)
            and module.in_proj_weight.dtype == module.out_proj.weight.dtype == torch.float32)


def _attend(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if not module.batch_first:
        same = key is value, query is key
        query, key, value = (tensor.transpose(0, 1).contiguous() for tensor in (query, key, value))
        key = query if same[1] else key
        value = key if same[0] else value
    width, heads = module.embed_dim, module.num_heads
    weight, bias = module.in_proj_weight, module.in_proj_bias

    def projected(rows: Tensor, first: int, count: int) -> Any:
        """(N, H, L, E / H) of ``count`` of query, key and value."""
        part = slice(first * width, (first + count) * width)
        made = kernels.linear(rows, weight[part], None if bias is None else bias[part])
        return made.view(*rows.shape[:2], count, heads, width // heads).permute(2, 0, 3, 1, 4)

    if query is key and key is value:
        queries, keys, values = projected(query, 0, 3)
    elif key is value:
        (queries, ), (keys, values) = projected(query, 0, 1), projected(key, 1, 2)
    elif query is key:
        (queries, keys), (values, ) = projected(query, 0, 2), projected(value, 2, 1)
    else:
        (queries, ), (keys, ), (values, ) = projected(query, 0, 1), projected(key, 1, 1), projected(value, 2, 1)
    made = scaled_dot_product_attention(queries, keys, values).transpose(1, 2).reshape(query.shape)
    out: Optional[Tensor] = module.out_proj.bias
    result = kernels.linear(made, module.out_proj.weight, out)
    return result if module.batch_first else result.transpose(0, 1)
