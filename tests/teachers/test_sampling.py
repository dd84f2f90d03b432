"""Samples of deformable attention by one operation: equal to the host's function, in real models, and put back."""

import threading

import pytest
import torch
from detrs import build_detr
from mmcv.ops import multi_scale_deform_attn as host

from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.hosts.taps import Tap
from kd_mm.teachers import sampling
from kd_mm.teachers.base import Teacher
from kd_mm.types.batch import KDBatch

ORIGINAL = host.multi_scale_deformable_attn_pytorch


@pytest.fixture(autouse=True)
def no_row_past_the_table(monkeypatch):
    """torch may read there without a word."""
    original = sampling.embedding_bag

    def checked(rows, table, **options):
        assert 0 <= int(rows.min()) and int(rows.max()) < len(table)
        return original(rows, table, **options)

    monkeypatch.setattr(sampling, 'embedding_bag', checked)


def drawn(sizes, images=2, queries=7, heads=2, points=3, width=4, dtype=torch.float32, spread=2.0):
    generator = torch.Generator().manual_seed(0)
    levels, cells = len(sizes), sum(high * wide for high, wide in sizes)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return (normal(images, cells, heads, width), torch.tensor(sizes),
            0.5 + spread * normal(images, queries, heads, levels, points, 2),
            normal(images, queries, heads, levels * points).softmax(-1).view(images, queries, heads, levels, points))


@pytest.mark.parametrize('spread', [0.2, 0.5, 5.0])  # inside; at the edges; nearly all outside
@pytest.mark.parametrize('sizes', [[(5, 7)], [(9, 4), (5, 2), (3, 1)], [(1, 1)], [(1, 6), (6, 1)]], ids=str)
def test_it_gives_what_the_host_gives(sizes, spread):
    given = drawn(sizes, spread=spread, dtype=torch.float64)
    torch.testing.assert_close(sampling.sampled(*given), ORIGINAL(*given), rtol=1e-10, atol=1e-12)
    given = drawn(sizes, spread=spread)
    torch.testing.assert_close(sampling.sampled(*given), ORIGINAL(*given), rtol=1e-4, atol=1e-5)


def test_places_on_the_edge_and_far_away():
    value, shapes, _, _ = drawn([(4, 6), (2, 3)], dtype=torch.float64)
    edges = torch.tensor([-1e9, -0.5, -1 / 12, 0.0, 1 / 12, 0.5, 1.0, 13 / 12, 1.5, 1e9], dtype=torch.float64)
    places = torch.cartesian_prod(edges, edges).view(1, 1, 1, 100, 2).expand(2, 2, 2, 100, 2)
    places = places.unsqueeze(1).expand(2, 1, 2, 2, 100, 2)
    weights = torch.rand(2, 1, 2, 2, 100, dtype=torch.float64)
    for one in range(100):  # each by itself: a wrong sign is not made good by another
        given = value, shapes, places[..., one:one + 1, :], weights[..., one:one + 1]
        torch.testing.assert_close(sampling.sampled(*given), ORIGINAL(*given), rtol=1e-9, atol=1e-9)


def test_more_queries_than_at_a_time(monkeypatch):
    given = drawn([(5, 7), (3, 4)], queries=11)
    whole = sampling.sampled(*given)
    monkeypatch.setattr(sampling, 'QUERIES', 4)
    torch.testing.assert_close(sampling.sampled(*given), whole, rtol=0, atol=0)


@pytest.mark.parametrize('wrong', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('where', ['places', 'values'])
def test_what_is_not_finite_gives_what_the_host_gives(wrong, where, monkeypatch):
    monkeypatch.setattr(sampling._INSIDE, 'depth', 1, raising=False)
    value, shapes, places, weights = drawn([(5, 6)])
    (places if where == 'places' else value)[0, 3] = wrong
    found = sampling.by_bags(ORIGINAL)(value, shapes, places, weights)
    expected = ORIGINAL(value, shapes, places, weights)
    assert not expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_values_laid_out_in_another_order():
    value, shapes, places, weights = drawn([(5, 7), (2, 2)])
    value, places, weights = (
        tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (value, places, weights))
    torch.testing.assert_close(sampling.sampled(value, shapes, places, weights),
                               ORIGINAL(value, shapes, places, weights), rtol=1e-4, atol=1e-5)


class Counting:
    """The host's function, and how often it was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **options):
        self.calls += 1
        return ORIGINAL(*args, **options)


@pytest.mark.parametrize('change', [
    '', 'gradients', 'no queries', 'half', 'other dtype', 'autocast', 'other shapes', 'an empty map', 'outside'])
def test_what_it_takes(change, monkeypatch):
    monkeypatch.setattr(sampling._INSIDE, 'depth', int(change != 'outside'), raising=False)
    value, shapes, places, weights = drawn([(5, 7)], queries=0 if change == 'no queries' else 7)
    if change == 'gradients':
        value.requires_grad_()
    if change == 'half':
        value, places, weights = value.bfloat16(), places.bfloat16(), weights.bfloat16()
    if change in ('other dtype', 'autocast'):
        value, weights = value.bfloat16(), weights.bfloat16()
    if change == 'other shapes':
        shapes = shapes - 1
    if change == 'an empty map':
        shapes = torch.cat([shapes, torch.tensor([[0, 3]])])
        places, weights = places.repeat(1, 1, 1, 2, 1, 1), weights.repeat(1, 1, 1, 2, 1)
    original, context = Counting(), torch.autocast('cpu', torch.bfloat16, enabled=change == 'autocast')
    with context:
        try:
            found = sampling.by_bags(original)(value, value_spatial_shapes=shapes, sampling_locations=places,
                                               attention_weights=weights)
        except RuntimeError:  # the host's own, of what it does not take either
            assert change in ('other dtype', 'no queries', 'other shapes', 'an empty map')
            found = None
        assert original.calls == (change not in ('', 'autocast'))
        if found is not None:
            expected = ORIGINAL(value, shapes, places, weights)
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    if change == 'gradients':
        found.sum().backward()
        assert value.grad.abs().sum() > 0


@pytest.mark.parametrize('name', ['deformable', 'dino'])
def test_a_detector_is_taught_with_it(name, monkeypatch):
    model = build_detr(name).eval()
    data = model.data_preprocessor(synthetic_batch(model, 2, (64, 96)), False)
    inputs, samples = data['inputs'], data['data_samples']
    original = Counting()
    monkeypatch.setattr(host, sampling.NAME, original)
    teacher, tap = Teacher(model, model.data_preprocessor), Tap(model, 'encoder', 'teacher')
    results, calls = [], []
    for speed in ('exact', 'auto', dict(onednn=True)):
        teacher.go(speed)
        for full in (True, False, False):
            before = original.calls
            teacher.run(inputs, samples, [tap], KDBatch(input_shape=(64, 96)), full=full)
            found = tap.read()[0]
        results.append(found)
        calls.append(original.calls - before)
        assert vars(host)[sampling.NAME] is original
    assert calls[0] > 0 and calls[1] == 0 and calls[2] == calls[0]
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_only_models_that_call_it_have_the_namespace():
    assert sampling.namespaces(build_detr('deformable')) == [host]
    assert sampling.namespaces(torch.nn.Conv2d(1, 1, 1)) == [] and sampling.namespaces(build_detr('detr')) == []


def test_passes_of_two_threads(monkeypatch):
    """The namespace is there once for all: nobody puts back the other's, and who teaches nobody gets the host's."""
    original, steps, calls = Counting(), [threading.Event() for _ in range(3)], []
    monkeypatch.setattr(host, sampling.NAME, original)

    def called():
        before = original.calls
        vars(host)[sampling.NAME](*drawn([(5, 7)]))
        calls.append(original.calls - before)

    def first():
        with sampling.sampling_in(host):
            steps[0].set()
            assert steps[1].wait(20)
            called()
        steps[2].set()

    thread = threading.Thread(target=first)
    thread.start()
    assert steps[0].wait(20)
    called()  # of this thread, in which no teacher runs
    with sampling.sampling_in(host):
        steps[1].set()
        assert steps[2].wait(20)
        called()
        with sampling.sampling_in(host):
            called()
        called()
    thread.join()
    assert calls == [1, 0, 0, 0, 0] and vars(host)[sampling.NAME] is original
    called()
    assert calls[-1] == 1
