"""Taps: what they record, and that they leave nothing."""


import gc
import weakref

import pytest
import torch
from torch import nn

from kd_mm.hosts.paths import expand_paths, module_at, resolve
from kd_mm.hosts.taps import StopForward, Tap, tensors_in
from kd_mm.hosts.tokens import TokenSizeError, guess_sizes, token_sizes, tokens_to_map


class Block(nn.Module):
    """Outputs of every kind, and an in-place activation after a convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.heads = nn.ModuleList([nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)])

    def forward(self, x):
        first = self.relu(self.conv(x))
        return dict(maps=[self.heads[0](first), self.heads[0](first * 2)], other=(self.heads[1](first), 3, None))

    def targets(self, x):
        return x + 1


class Attention(nn.Module):
    def forward(self, x, hw_shape):
        return x * 2, hw_shape


@pytest.fixture
def model():
    torch.manual_seed(0)
    holder = nn.Module()
    holder.block, holder.backbone = Block(), nn.Sequential(Attention())
    return holder


IMAGE = torch.randn(2, 3, 4, 5)


def record(model, path, call):
    tap = Tap(model, path)
    tap.arm((16, 16))
    call()
    return tap.read()


def test_tuple_list_and_dict_outputs_give_one_tensor_an_item(model):
    found = record(model, 'block', lambda: model.block(IMAGE))
    expected = model.block(IMAGE)
    assert len(found) == 3
    for value, other in zip(found, [*expected['maps'], expected['other'][0]]):
        torch.testing.assert_close(value, other)
    assert tensors_in([torch.ones(1), torch.ones(1, dtype=torch.long), 'x', {'a': torch.zeros(1)}])[1].item() == 0


def test_repeated_calls_give_one_a_call(model):
    found = record(model, 'block.heads.0', lambda: model.block(IMAGE))
    assert len(found) == 2
    assert len(record(model, 'block.heads.1', lambda: model.block(IMAGE))) == 1


def test_direct_forward_and_methods_are_seen(model):
    assert len(record(model, 'block.conv', lambda: model.block.conv.forward(IMAGE))) == 1
    value, = record(model, 'block.targets', lambda: model.block.targets(IMAGE))
    torch.testing.assert_close(value, IMAGE + 1)
    other = Block()
    tap = Tap(model, 'block.targets')
    tap.arm()
    other.targets(IMAGE)  # another instance of the class is not tapped
    with pytest.raises(RuntimeError, match="tap 'block.targets' did not fire"):
        tap.read()


def test_value_before_an_in_place_activation(model):
    expected = model.block.conv(IMAGE)
    assert (expected < 0).any()
    tap = Tap(model, 'block.conv')
    for _ in range(3):
        tap.arm()
        model.block(IMAGE)
        value, = tap.read()
        torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert model.block.conv.weight.grad.abs().sum() > 0
    assert model.block.relu.inplace


def test_no_copy_where_nothing_is_overwritten(model):
    tap = Tap(model, 'block.heads.1')
    outputs = []
    model.block.heads[1].register_forward_hook(lambda m, a, output: outputs.append(output))
    pointers = []
    for _ in range(3):
        tap.arm()
        model.block(IMAGE)
        value, = tap.read()
        pointers.append(value.data_ptr() == outputs[-1].data_ptr())
    assert pointers == [False, True, True]  # the first pass finds out


def test_overwriting_that_starts_later_is_an_error(model):
    tap = Tap(model, 'block.heads.1')
    for overwrite in (False, True):
        tap.arm()
        output = model.block(IMAGE)['other'][0]
        if overwrite:
            output.mul_(2)
            with pytest.raises(RuntimeError, match='overwritten in place in this step'):
                tap.read()
        else:
            tap.read()


def test_tokens_become_maps(model):
    tokens = torch.randn(2, 12, 7)
    found = record(model, 'backbone.0', lambda: model.backbone[0](tokens, (3, 4)))
    torch.testing.assert_close(found[0][:, :, 1, 2], 2 * tokens[:, 6])
    with_class = torch.randn(2, 13, 7)
    found = record(model, 'backbone.0', lambda: model.backbone[0](with_class, hw_shape=(3, 4)))
    torch.testing.assert_close(found[0][:, :, 0, 0], 2 * with_class[:, 1])
    # without a size, below the backbone, the input's shape tells: 16 tokens of a 16x16 input have stride 4
    found = record(model, 'backbone.0', lambda: model.backbone[0](torch.randn(2, 16, 7), None))
    assert found[0].shape == (2, 7, 4, 4)
    assert guess_sizes(12, (48, 64)) == [(3, 4)] and guess_sizes(11, (48, 64)) == []
    assert tokens_to_map(tokens, (2, 6)).shape == (2, 7, 2, 6)


def attend(model, count, *size, input_shape=(16, 16), **options):
    """A tap that has recorded tokens (1, count, 3) of a call with these arguments."""
    tap = Tap(model, 'backbone.0', 'teacher', **options)
    tap.arm(input_shape)
    model.backbone[0](torch.arange(count * 3.0).view(1, count, 3), *size)
    return tap


def test_an_exact_size_comes_before_one_that_leaves_tokens_over(model):
    # 4x4 is the map; 2x2, the next stage's, would leave 12 of the 16 tokens.
    value, = attend(model, 16, [(2, 2), (4, 4)]).read()
    assert value.shape == (1, 3, 4, 4)
    assert attend(model, 17, [(0, 0), (1, 20), (4, 4)]).read()[0].shape == (1, 3, 4, 4)


@pytest.mark.parametrize('count, size, input_shape, found', [
    (128, ((8, 16), (16, 8)), (16, 16), '128 tokens, and their map could be 8x16 or 16x8 .named by its call'),
    (101, ((10, 10), (9, 11)), (16, 16), '10x10 or 9x11'),
    # all tokens, or all but a class token, by two strides of the input
    (3, (None, ), (96, 160), "1x3 or 1x2 .by the input's 96x160")])
def test_an_ambiguous_size_is_refused_with_the_mend(model, count, size, input_shape, found):
    tap = attend(model, count, size if len(size) > 1 else None, input_shape=input_shape)
    with pytest.raises(TokenSizeError, match=f"teacher: the tap 'backbone.0' gives .*{found}.*tokens=.H, W.") as error:
        tap.read()
    assert error.value.shapes == [(1, count, 3)] and not tap.fired and 'forward' not in vars(model.backbone[0])
    # Whoever reads the calls as they were is not concerned.
    tap = attend(model, count, size if len(size) > 1 else None, input_shape=input_shape, structured=True)
    assert tap.read()[0].shape == (1, count, 3) and 'left as they are' in tap.token_size_note


def test_sizes_that_agree_are_not_ambiguous(model):
    assert attend(model, 128, [(8, 16), (8, 16), (7, 7)]).read()[0].shape == (1, 3, 8, 16)


def test_given_tokens_decide(model):
    both = ((8, 16), (16, 8))
    value, = attend(model, 128, both, tokens=(16, 8)).read()
    assert value.shape == (1, 3, 16, 8) and value[0, 0, 1, 0] == 2 * 3 * 8
    # a stride in pixels, for inputs of any size, padded or cut; tokens in front are dropped
    assert attend(model, 128, both, tokens=16, input_shape=(250, 128)).read()[0].shape == (1, 3, 16, 8)
    value, = attend(model, 29, None, tokens=16, input_shape=(64, 112)).read()
    assert value.shape == (1, 3, 4, 7) and value[0, 0, 0, 0] == 2 * 3
    assert attend(model, 24, None, tokens=16, input_shape=(64, 100)).read()[0].shape == (1, 3, 4, 6)
    for tokens, shape, text in (((8, 8), (16, 16), 'an input of 16x16, and tokens=.8, 8. makes a map of 8x8'),
                                (32, (64, 128), 'tokens=32 makes a map of 2x4'), (32, None, 'a map of unknown')):
        with pytest.raises(ValueError, match=f'128 tokens.*{text}.*tokens=STRIDE') as error:
            attend(model, 128, both, tokens=tokens, input_shape=shape).read()
        assert not isinstance(error.value, TokenSizeError)  # another input may fit
    with pytest.raises(ValueError, match='2x2 or 1x1 .tokens=16') as error:
        attend(model, 5, None, tokens=16, input_shape=(20, 20)).read()
    assert not isinstance(error.value, TokenSizeError)


def test_what_was_taken_is_noted_once(model):
    tap = attend(model, 13, (3, 4))
    assert tap.token_size_note is None
    tap.read()
    note = "teacher 'backbone.0': 13 tokens are a map of 3x4 after the first 1 (named by its call)"
    assert tap.token_size_note == note
    tap.arm()
    model.backbone[0](torch.zeros(1, 6, 3), (2, 3))
    assert tap.read()[0].shape == (1, 3, 2, 3) and tap.token_size_note == note
    other = attend(model, 16, None)
    other.read()
    assert other.token_size_note.endswith("16 tokens are a map of 4x4 (by the input's 16x16)")
    maps = Tap(model, 'block')
    maps.arm()
    model.block(IMAGE)
    maps.read()
    assert maps.token_size_note is None


@pytest.mark.parametrize('tokens', [0, -1, True, 2.0, (4, ), (4, 0), (4, 4, 4), (4, 2.0), 'x'])
def test_tokens_that_are_no_size(model, tokens):
    with pytest.raises(ValueError, match='tokens=.* must be .H, W.'):
        Tap(model, 'backbone.0', tokens=tokens)
    with pytest.raises(ValueError, match='tokens=.* must be .H, W.'):
        token_sizes(dict(student=16, teacher=tokens))


def test_tokens_that_are_overwritten_in_place(model):
    """A map without its class token is a view that does not begin where the tokens do."""
    tap = Tap(model, 'backbone.0')
    for _ in range(3):
        tap.arm()
        output, _ = model.backbone[0](torch.ones(1, 5, 3), (2, 2))
        output.zero_()
        assert tap.read()[0].min() == 2


def alive(references):
    gc.collect()
    return [reference() is not None for reference in references]


def test_a_read_tap_holds_nothing(model):
    """Neither what it recorded, nor the originals of its copies, nor arguments."""
    for structured in (False, True):
        for overwrite in (False, True):
            tap = Tap(model, 'block.targets', structured=structured)
            for _ in range(2):
                tap.arm()
                given = torch.ones(2, 3)
                output = model.block.targets(given)
                if overwrite:
                    output.mul_(2)
                references = [weakref.ref(given), weakref.ref(output)]
                del given, output
                found = tap.read()
                assert found[0].max() == 2
                del found
                assert alive(references) == [False, False]
    # Where copies are needed, the originals are not held until the end of the step.
    tap.structured = False
    tap.arm()
    given = torch.ones(2, 3)
    references = [weakref.ref(given), weakref.ref(model.block.targets(given))]
    del given
    assert alive(references) == [False, False] and tap.fired


def test_a_part_of_a_larger_tensor_does_not_keep_all_of_it(model):
    model.block.part = lambda x: torch.cat([x, x, x])[:1]
    tap = Tap(model, 'block.part')
    for looks in (True, False):  # the first pass looks whether the original is overwritten
        tap.arm()
        reference = weakref.ref(model.block.part(torch.ones(1, 5)))
        assert alive([reference]) == [looks]
        value, = tap.read()
        assert value.untyped_storage().nbytes() == value.nbytes


def test_nothing_is_left_and_disarmed_taps_see_nothing(model):
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    tap = Tap(model, 'block.conv')
    tap.arm()
    assert 'forward' in vars(model.block.conv)
    with pytest.raises(RuntimeError, match='two taps'):
        Tap(model, 'block.conv').arm()
    model.block(IMAGE)
    tap.disarm()
    model.block(IMAGE)
    assert tap.calls == 1 and len(tap.read()) == 1
    tap.clear()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_a_tap_keeps_what_was_on_the_instance(model):
    own = model.block.conv.forward
    model.block.conv.forward = lambda x: own(x) * 3
    marked = vars(model.block.conv)['forward']
    value, = record(model, 'block.conv', lambda: model.block.conv(IMAGE))
    torch.testing.assert_close(value, own(IMAGE) * 3)
    assert vars(model.block.conv)['forward'] is marked


def test_stop_signal(model):
    def keep(tap):
        raise StopForward

    tap = Tap(model, 'block.conv', keep=keep)
    tap.arm()
    with pytest.raises(StopForward):
        model.block(IMAGE)
    assert len(tap.read()) == 1


def test_paths(model):
    assert expand_paths(model, 'block.heads.*') == ['block.heads.0', 'block.heads.1']
    assert expand_paths(model, ['block.conv', 'block.heads.[1]']) == ['block.conv', 'block.heads.1']
    assert expand_paths(model, 'none.*') == ['none.*']
    assert resolve(model, 'block.heads.-1')[0] is model.block.heads[1]
    with pytest.raises(KeyError, match="teacher has no module 'block.cnv'. Closest: 'block.conv'"):
        resolve(model, 'block.cnv', 'teacher')
    with pytest.raises(KeyError, match='block has: conv, relu, heads'):
        resolve(model, 'block.training')


def test_structured_tap_keeps_calls_as_they_were(model):
    """Arguments and results with their structure; items that the host replaces in its own list later stay."""
    tap = Tap(model, 'block', structured=True)
    for _ in range(2):  # the first pass copies, the second does not
        tap.arm()
        output = model.block(IMAGE)
        expected = [tensor.clone() for tensor in (*output['maps'], output['other'][0])]
        found = tap.read()
        assert len(found) == 3 and len(found.calls) == 1
        assert found.calls[0].args[0] is IMAGE and found.calls[0].kwargs == {}
        assert list(found.calls[0].output) == ['maps', 'other']
        for value, other in zip(found, expected):
            torch.testing.assert_close(value, other)
    model.block.pair = lambda x: [x + 1, [x + 2]]
    tap = Tap(model, 'block.pair', structured=True)
    tap.arm()
    pair = model.block.pair(IMAGE)
    pair[0] = None
    first, (second, ) = tap.read().calls[0].output
    torch.testing.assert_close(first, IMAGE + 1)
    torch.testing.assert_close(second, IMAGE + 2)


def test_plain_tap_holds_no_arguments(model):
    tap = Tap(model, 'block')
    tap.arm()
    model.block(IMAGE)
    assert tap.read().calls == ()


class Residual(nn.Module):
    """A residual block as mmdet writes it: one ReLU in place, used twice."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(1), nn.BatchNorm2d(1), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.relu(x - 1) - 3 + x)


def test_the_sum_before_the_last_relu_of_a_block():
    model = nn.Sequential(Residual(), Residual())
    paths = expand_paths(model, '[01]:pre_relu')
    assert paths == ['0:pre_relu', '1:pre_relu'] and module_at(model, paths[1]) is model[1]
    taps = [Tap(model, path) for path in paths]
    x = torch.tensor([0.5, 1.5, 2.0, 4.0]).view(1, 1, 2, 2).requires_grad_()
    for _ in range(3):
        for tap in taps:
            tap.arm()
        output = model(x)
        first, second = (tap.read() for tap in taps)
        # relu(x - 1) - 3 + x, and the same of its positive part
        assert first[0].flatten().tolist() == [-2.5, -1.0, 0.0, 4.0] and len(first) == len(second) == 1
        assert second[0].flatten().tolist() == [-3.0, -3.0, -3.0, 4.0]
        assert output.flatten().tolist() == [0.0, 0.0, 0.0, 4.0] and taps[0].calls == 2
        grad, = torch.autograd.grad(first[0].sum(), x)
        assert grad.flatten().tolist() == [1.0, 2.0, 2.0, 2.0]
        assert 'forward' not in vars(model[0].relu)
    with pytest.raises(KeyError, match="'0.bn1' has no `relu`"):
        Tap(model, '0.bn1:pre_relu')
    with pytest.raises(KeyError, match="no module '2'"):
        Tap(model, '2:pre_relu')
