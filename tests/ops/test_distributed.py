"""Two processes over gloo against one on the joined batch."""

import importlib.util
from pathlib import Path

import pytest
import torch
from ranks import run

from kd_mm.ops import distributed
from kd_mm.registry import build

WORKER = Path(__file__).resolve().parents[1] / 'helpers' / 'distributed_worker.py'


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp('ranks') / 'two'
    return run([str(WORKER), str(out)], out, 2)


def worker_module():
    spec = importlib.util.spec_from_file_location('distributed_worker', WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gathered_relations_equal_those_of_the_joined_batch(ranks):
    student, teacher, _ = worker_module().make()
    student.requires_grad_()
    joined = build(dict(type='CIRKDMiniBatchLoss'))(student, teacher)
    joined.backward()
    assert torch.isclose((ranks[0]['loss'] + ranks[1]['loss']) / 2, joined, rtol=1e-12)
    # DDP averages over the ranks, so half of what each rank has is its share of the joined gradient.
    found = torch.cat([rank['grad'] for rank in ranks]) / 2
    assert torch.allclose(found, student.grad, rtol=1e-9, atol=1e-15)


def test_averaged_gradients_are_zero_where_one_rank_has_none_and_missing_where_no_rank_has_one(ranks):
    for rank in ranks:
        both, second, none = rank['averaged']
        assert both.tolist() == [1.5, 1.5] and second.tolist() == [1.0, 1.0, 1.0] and none is None


def test_the_memory_is_equal_on_all_ranks_and_holds_the_images_of_all(ranks):
    first, second = (rank['queues'] for rank in ranks)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    _, teacher, labels = worker_module().make()
    unit = torch.nn.functional.normalize(teacher, dim=1).movedim(1, -1)
    for image in range(4):  # a region of every image of both ranks, twice: of step 0 and of step 1
        for label in range(3):
            mean = torch.nn.functional.normalize(unit[image][labels[image] == label].mean(dim=0), dim=0)
            stored = first['0.region.vectors'][label]
            assert (stored - mean).abs().amax(dim=1).min() < 1e-12
    pixels = first['0.pixel.vectors'][0, :int(first['0.pixel.pointer'][0])]
    known = unit[labels == 0]
    assert len(pixels) == 32 and (pixels[:, None] - known).abs().amax(dim=2).amin(dim=1).max() < 1e-12
    sources = (pixels[:16, None] - unit.reshape(-1, 5)).abs().amax(dim=2).argmin(dim=1) // 24
    assert sources.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_queues_histograms_and_statistics_are_those_of_all_images(ranks):
    """Also where the ranks have different numbers of images, as at the end of an epoch."""
    first, second = (rank['states'] for rank in ranks)
    for name in first:
        assert all(torch.equal(first[name][key], second[name][key]) for key in first[name]), name
    student, teacher, labels = worker_module().make()
    seen = torch.nn.functional.normalize(teacher[[0, 2, 3]].mean(dim=(2, 3)), dim=1)
    torch.testing.assert_close(first['queue']['queues.0.rows'][:6], torch.cat([seen, seen]))
    assert first['histogram']['histograms.0.counts'].sum() == 2 * labels.numel()
    torch.testing.assert_close(first['running']['0.mean'], teacher.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(first['running']['0.variance'], teacher.var(dim=(0, 2, 3), unbiased=False))


def test_unequal_shapes_are_an_error_on_every_rank(ranks):
    for rank in ranks:
        assert '(1, 3), (2, 3)' in rank['message'] and 'gather' in rank['message']


def test_one_process_gathers_its_own():
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(distributed.gather(x), x) and not distributed.gather(x).requires_grad
    assert distributed.gather_with_gradient(x) is x
