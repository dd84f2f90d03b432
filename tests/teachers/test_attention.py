"""Attention without weights: each case that its own form does not have goes to torch, with the same result."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd_mm.teachers import kernels
from kd_mm.teachers.attention import without_weights


class Operations(TorchDispatchMode):

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def compared(module, given, direct=True, train=False, **kwargs):
    """Whether the library ran; the result is that of the module."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module.requires_grad_(False).train(train)
    torch.manual_seed(0)
    expected = module(*given, **kwargs)
    torch.manual_seed(0)
    with Operations() as operations:
        found = without_weights(module, module.forward, direct)(*given, **kwargs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    return any('_linear_pointwise' in name for name in operations.names), found[1]


def rows(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


PADDING = torch.zeros(3, 40, dtype=torch.bool)
PADDING[1, 20:] = True
ROWS = rows(40, 3, 8)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(40)


def test_plain_tokens_run_by_the_library():
    assert compared(nn.MultiheadAttention(8, 2), [ROWS] * 3) == (True, None)
    assert compared(nn.MultiheadAttention(8, 2), [ROWS] * 3, direct=False) == (False, None)


@pytest.mark.parametrize('options, given, kwargs', [
    (dict(kdim=4, vdim=4), [ROWS, rows(40, 3, 4), rows(40, 3, 4)], {}),
    (dict(dropout=0.5), [ROWS] * 3, dict(train=True)),
    (dict(add_bias_kv=True), [ROWS] * 3, {}), (dict(add_zero_attn=True), [ROWS] * 3, {}),
    ({}, [ROWS] * 3, dict(attn_mask=CAUSAL)), ({}, [ROWS] * 3, dict(attn_mask=CAUSAL, is_causal=True)),
    ({}, [ROWS] * 3, dict(key_padding_mask=PADDING)), ({}, [ROWS] * 3 + [PADDING], {}),
    ({}, [rows(40, 8)] * 3, {}), (dict(dtype=torch.float64), [rows(40, 3, 8, dtype=torch.float64)] * 3, {})],
    ids=['widths', 'dropout', 'bias_kv', 'zero_attn', 'mask', 'causal', 'padding', 'padding_by_position', 'one_picture',
         'float64'])
def test_what_is_not_plain_goes_to_torch(options, given, kwargs):
    assert not compared(nn.MultiheadAttention(8, 2, **options), given, **kwargs)[0]


def test_weights_that_are_asked_for_by_position_are_given():
    ran, weights = compared(nn.MultiheadAttention(8, 2), [ROWS] * 3 + [None, True])
    assert not ran and weights.shape == (3, 40, 40)


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(kernels, 'available', lambda: False)
    assert not compared(nn.MultiheadAttention(8, 2), [ROWS] * 3)[0]
