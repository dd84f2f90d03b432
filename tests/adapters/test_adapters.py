"""All adapters: what they give, what they create, and that they get gradients."""

from pathlib import Path

import pytest
import torch

from kd_mm.adapters import ConvAdapter, NormAdapter, ResizeAdapter, SequentialAdapter
from kd_mm.adapters.auto import auto_adapter
from kd_mm.adapters.base import Adapter
from kd_mm.losses.base.loss import KDLoss
from kd_mm.registry import MODELS, build, choices


def maps(*shapes, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=draw).to(dtype) for shape in shapes)


STUDENT = maps((2, 4, 8, 8), (2, 6, 4, 4))
TEACHER = maps((2, 6, 8, 8), (2, 6, 4, 4), seed=1)
EVERY = [dict(type='ConvAdapter'), dict(type='ConvAdapter', kernel_size=3, norm=True, relu=True, always=True),
         dict(type='GraphAdapter'), dict(type='NormAdapter'), dict(type='ResizeAdapter'),
         dict(type='SequentialAdapter', adapters=[dict(type='ConvAdapter'), dict(type='ResizeAdapter')])]


#: Adapters that are tested in files of their own.
ELSEWHERE = {'CrossAttentionAdapter': 'test_cross_attention.py', 'RunningStandardiseAdapter': 'test_running.py'}


def test_every_registered_adapter_is_here():
    assert {config['type'] for config in EVERY} | set(ELSEWHERE) == set(choices(Adapter))
    for name, file in ELSEWHERE.items():
        assert name in Path(__file__).with_name(file).read_text()


@pytest.mark.parametrize('config', EVERY)
def test_prepare_creates_what_forward_uses(config):
    adapter = build(config, Adapter, 'adapter')
    adapter.prepare(STUDENT, TEACHER)
    before = {name: id(parameter) for name, parameter in adapter.named_parameters()}
    state = {name: value.clone() for name, value in adapter.state_dict().items()}
    adapter.prepare(STUDENT, TEACHER)
    assert all(torch.equal(value, state[name]) for name, value in adapter.state_dict().items())
    student, teacher = adapter(STUDENT, TEACHER)
    assert {name: id(parameter) for name, parameter in adapter.named_parameters()} == before
    assert isinstance(student, tuple) and isinstance(teacher, tuple) and len(student) == len(teacher) == 2
    if 'Resize' not in config['type']:
        assert [s.shape for s in student] == [t.shape for t in TEACHER]


@pytest.mark.parametrize('config', EVERY)
def test_gradients_reach_student_and_parameters(config):
    adapter = build(config, Adapter, 'adapter')
    student = tuple(tensor.clone().requires_grad_() for tensor in STUDENT)
    teacher = TEACHER if config['type'] != 'ResizeAdapter' else maps((2, 4, 16, 16), (2, 6, 2, 3))
    adapted, targets = adapter(student, teacher)
    sum((s - t).square().mean() for s, t in zip(adapted, targets)).backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in student)
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@pytest.mark.parametrize('config', EVERY)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_precision(config, dtype):
    adapter = build(config, Adapter, 'adapter')
    full = torch.float64 if dtype == torch.float64 else torch.float32
    student = tuple(tensor.to(dtype) for tensor in STUDENT)
    teacher = tuple(tensor.to(dtype) for tensor in TEACHER)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        adapted, targets = adapter(student, teacher)
    assert all(parameter.dtype == full for parameter in adapter.parameters())
    if config['type'] != 'ResizeAdapter':  # equal sizes are passed on as they are
        assert adapted[0].dtype == full


@pytest.mark.parametrize('config', EVERY)
def test_errors_name_the_level(config):
    with pytest.raises(ValueError, match='2 student levels and 1 teacher levels'):
        build(config)(STUDENT, TEACHER[:1])
    with pytest.raises(ValueError, match=r'level 1: student \(2, 6\).*not both maps'):
        build(config)((STUDENT[0], torch.zeros(2, 6)), TEACHER)


def test_conv_only_where_channels_differ():
    adapter = ConvAdapter()
    student, teacher = adapter(STUDENT, TEACHER)
    assert student[1] is STUDENT[1] and teacher is TEACHER
    assert len(list(adapter.parameters())) == 2
    assert not torch.equal(ConvAdapter(always=True)(STUDENT, TEACHER)[0][1], STUDENT[1])


def test_conv_by_hand():
    adapter = ConvAdapter(relu=True)
    adapter.prepare(STUDENT, TEACHER)
    expected = torch.einsum('oi,nihw->nohw', adapter.convs[0].weight[..., 0, 0], STUDENT[0])
    expected = (expected + adapter.convs[0].bias[:, None, None]).relu()
    assert torch.allclose(adapter(STUDENT, TEACHER)[0][0], expected, atol=1e-6)
    assert ConvAdapter(bias=False, kernel_size=3)(STUDENT, TEACHER)[0][0].shape == (2, 6, 8, 8)


def test_conv_norm_has_zero_mean():
    adapted = ConvAdapter(norm=True)(STUDENT, TEACHER)[0][0]
    assert torch.allclose(adapted.mean(dim=(0, 2, 3)), torch.zeros(6), atol=1e-5)


def test_other_widths_or_levels_than_prepared():
    for adapter in (ConvAdapter(), NormAdapter()):
        adapter.prepare(STUDENT, TEACHER)
        with pytest.raises(ValueError, match=r'level 0: student \(2, 5, 8, 8\).*prepared for 4 channels'):
            adapter(maps((2, 5, 8, 8), (2, 6, 4, 4)), TEACHER)
        with pytest.raises(ValueError, match='prepared for 2 levels and got 1'):
            adapter(STUDENT[:1], TEACHER[:1])


def test_norm_removes_mean_and_scale_of_both_sides():
    adapter = NormAdapter(always=False)
    same = maps((2, 6, 8, 8)), maps((2, 6, 8, 8), seed=3)
    student, teacher = adapter(*same)
    moved = adapter(tuple(5 * s + 3 for s in same[0]), tuple(0.5 * t - 7 for t in same[1]))
    assert torch.allclose(moved[0][0], student[0], atol=1e-4) and torch.allclose(moved[1][0], teacher[0], atol=1e-4)
    assert torch.allclose(student[0].var(dim=(0, 2, 3), unbiased=False), torch.ones(6), atol=1e-3)
    assert not list(adapter.parameters()) and not list(adapter.buffers())
    adapter.eval()
    assert torch.equal(adapter(*same)[0][0], student[0])
    assert len(list(NormAdapter().parameters())) == 0


def test_norm_always_has_a_convolution():
    adapter = NormAdapter()
    adapter.prepare(STUDENT, TEACHER)
    assert [tuple(conv.weight.shape) for conv in adapter.convs] == [(6, 4, 1, 1), (6, 6, 1, 1)]


def test_resize_either_side():
    student, teacher = maps((1, 2, 4, 6)), maps((1, 2, 8, 6), seed=1)
    adapted, same = ResizeAdapter()(student, teacher)
    assert adapted[0].shape == (1, 2, 8, 6) and same is teacher
    same, adapted = ResizeAdapter(side='teacher')(student, teacher)
    assert adapted[0].shape == (1, 2, 4, 6) and same is student
    corners = ResizeAdapter(align_corners=True)(student, teacher)[0][0]
    # Between rows 0 and 3 of the student lie seven steps of 3/7.
    between = 4 / 7 * student[0][..., 0, :] + 3 / 7 * student[0][..., 1, :]
    assert torch.allclose(corners[..., 1, :], between, atol=1e-6)
    with pytest.raises(ValueError, match="side='both'"):
        ResizeAdapter(side='both')


def test_sequential_prepares_each_with_the_result_of_the_one_before():
    adapter = SequentialAdapter([dict(type='ResizeAdapter'), dict(type='ConvAdapter', norm=True), NormAdapter()])
    student, teacher = maps((2, 4, 4, 4)), maps((2, 6, 8, 8), seed=1)
    adapter.prepare(student, teacher)
    assert adapter.adapters[2].convs[0].in_channels == 6
    assert adapter.adapters[1].norms[0].num_batches_tracked == 0 and adapter.adapters[1].training
    assert adapter(student, teacher)[0][0].shape == (2, 6, 8, 8)
    with pytest.raises(ValueError, match='adapters is empty'):
        SequentialAdapter([])


def test_a_prepared_adapter_loads_the_state_of_another():
    config = dict(type='SequentialAdapter', adapters=[dict(type='ConvAdapter', norm=True), dict(type='NormAdapter')])
    first, second = build(config), build(config)
    first(STUDENT, TEACHER)
    second.prepare(STUDENT, TEACHER)
    second.load_state_dict(first.state_dict())
    first.eval(), second.eval()
    assert torch.equal(first(STUDENT, TEACHER)[0][0], second(STUDENT, TEACHER)[0][0])


@pytest.mark.parametrize('shapes, expected', [
    (((1, 4, 8, 8), (1, 4, 8, 8)), 'NoneType'), (((1, 4, 8, 8), (1, 6, 8, 8)), 'ConvAdapter'),
    (((1, 4, 8, 8), (1, 4, 8, 9)), 'ResizeAdapter'), (((1, 4, 4, 4), (1, 6, 8, 8)), 'SequentialAdapter')])
def test_auto_adapter_of_a_feature_loss(shapes, expected):
    student, teacher = maps(shapes[0]), maps(shapes[1])
    adapter = auto_adapter(build(dict(type='FitNetLoss')), student, teacher)
    assert type(adapter).__name__ == expected
    if adapter is not None:
        assert adapter(student, teacher)[0][0].shape == teacher[0].shape


def test_auto_adapter_knows_what_a_loss_needs():
    student, teacher = maps((1, 4, 4, 4)), maps((1, 6, 8, 8))
    assert type(auto_adapter(build(dict(type='PKDLoss')), student, teacher)) is ConvAdapter
    assert type(auto_adapter(build(dict(type='SoftmaxKDLoss')), student, teacher)) is ResizeAdapter
    assert auto_adapter(build(dict(type='SoftmaxKDLoss')), maps((3, 4)), maps((3, 6))) is None
    assert auto_adapter(build(dict(type='PKDLoss')), student, teacher * 2) is None


@pytest.mark.parametrize('name', choices(KDLoss))
def test_auto_adapter_never_mixes_logits(name):
    loss = MODELS.module_dict[name]  # what an adapter must know of a loss, its class says
    adapter = auto_adapter(loss, maps((1, 4, 8, 8)), maps((1, 6, 8, 8)))
    assert (adapter is None) == (loss.logits or not loss.same_channels)


def test_a_graph_block_of_equal_cells_hears_the_mean():
    """All cells alike: the attention is uniform, and batch norm of a constant leaves its bias."""
    from kd_mm.adapters.graph import GraphBlock
    block = GraphBlock(2)
    torch.nn.init.constant_(block.spread[1].bias, 2.0)
    for weight in (block.fuse[0].weight, block.value.weight, block.spread[0].weight):
        torch.nn.init.ones_(weight)
    seen = []
    block.fuse[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block(torch.ones(2, 2, 3, 3))
    assert torch.allclose(seen[0][:, :2], torch.ones(2, 2, 3, 3))
    # A mean of nine rounds by 1e-7, and the batch norm of a constant divides that by the root of its eps, 3e-3.
    assert torch.allclose(seen[0][:, 2:], torch.full((2, 2, 3, 3), 2.0), atol=1e-3)


def test_a_graph_block_never_holds_all_relations():
    """With the fused kernel alone allowed: it refuses what is not contiguous, silently where others may step in."""
    from kd_mm.adapters.graph import GraphBlock
    attention = pytest.importorskip('torch.nn.attention')
    features = torch.randn(2, 4, 6, 8, requires_grad=True)
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        GraphBlock(4)(features).sum().backward()
    assert features.grad.isfinite().all()


def test_a_graph_block_passes_what_the_query_looks_for():
    """One channel pair, sharp attention: every cell hears the cell with the largest key."""
    from kd_mm.adapters.graph import GraphBlock
    block = GraphBlock(2)
    for conv in (block.query, block.key, block.value):
        conv.weight.data = torch.tensor([[1.0, 0.0]]).view(1, 2, 1, 1)
    block.query.weight.data *= 100
    seen = []
    block.spread[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    cells = torch.tensor([1.0, 2.0, 5.0, 3.0]).view(1, 1, 2, 2)
    block(torch.cat([cells, -cells], dim=1).repeat(2, 1, 1, 1))
    assert torch.allclose(seen[0], torch.full((2, 1, 2, 2), 5.0))
