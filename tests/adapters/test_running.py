import copy

import pytest
import torch

from kd_mm.adapters.running import RunningMoments, RunningStandardiseAdapter


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batches(count, scale=3.0, channels=4):
    return [5 + scale * torch.randn(2, channels, 6, 7).double() * torch.arange(1, channels + 1)[:, None, None]
            for _ in range(count)]


def test_the_first_batches_have_exact_statistics():
    given = batches(5)
    moments = RunningMoments(given[0])
    for one in given:
        moments.add(one, 0.01)
    every = torch.cat(given)
    torch.testing.assert_close(moments.mean, every.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(moments.variance, every.var(dim=(0, 2, 3), unbiased=False))
    assert moments.batches == 5


def test_later_ones_are_exponential():
    moments = RunningMoments(torch.zeros(1, 1, 1, 1).double())
    for value in (0.0, 0.0, 8.0, 8.0):
        moments.add(torch.full((1, 1, 2, 2), value).double(), 0.5)
    assert moments.mean.item() == 6.0  # 0, 0, 4, 6


@pytest.mark.parametrize('scale', ['global', 'channel'])
def test_mean_0_and_variance_1(scale):
    adapter = RunningStandardiseAdapter(scale=scale)
    for one in batches(20):
        _, (found, ) = adapter((torch.randn(2, 3, 6, 7).double(), ), (one, ))
    assert found.mean().abs() < 0.2
    deviations = found.std(dim=(0, 2, 3))
    if scale == 'channel':
        torch.testing.assert_close(deviations, torch.ones(4).double(), rtol=0.2, atol=0)
    else:  # their proportions stay
        torch.testing.assert_close(deviations / deviations[0], torch.arange(1.0, 5.0).double(), rtol=0.3, atol=0)
        assert deviations.square().mean().sqrt().item() == pytest.approx(1, rel=0.1)


def test_teachers_of_any_scale_weigh_alike():
    """The gradient of a squared loss on two teachers, one a thousand times the other."""
    student, given = torch.randn(2, 4, 6, 7).double().requires_grad_(), batches(1)[0]
    slopes = []
    for factor in (1.0, 1000.0):
        adapter = RunningStandardiseAdapter(always=False)
        (own, ), (theirs, ) = adapter((student, ), (given * factor, ))
        slopes.append(torch.autograd.grad((own - theirs).square().mean(), student)[0].norm())
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=0)


def test_evaluation_counts_nothing_and_a_state_is_restored():
    adapter, given = RunningStandardiseAdapter(), batches(2)
    student = torch.randn(2, 3, 6, 7).double()
    adapter((student, ), (given[0], ))
    before = copy.deepcopy(adapter.state_dict())
    adapter.eval()((student, ), (given[1], ))
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())
    other = RunningStandardiseAdapter()
    other.prepare((student, ), (given[0], ))
    other.load_state_dict(before)
    assert torch.equal(other.eval()((student, ), (given[1], ))[1][0], adapter((student, ), (given[1], ))[1][0])


@pytest.mark.parametrize('options, message', [
    (dict(scale='all'), "scale='all'"), (dict(momentum=0), 'momentum=0'), (dict(momentum=2), 'momentum=2'),
    (dict(always='no'), "always='no'")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RunningStandardiseAdapter(**options)


def test_other_widths_are_refused():
    adapter = RunningStandardiseAdapter()
    adapter((torch.zeros(1, 3, 2, 2), ), (torch.zeros(1, 4, 2, 2), ))
    with pytest.raises(ValueError, match='prepared for 3 and 4 channels'):
        adapter((torch.zeros(1, 3, 2, 2), ), (torch.zeros(1, 5, 2, 2), ))
    with pytest.raises(ValueError, match='prepared for 1 levels'):
        adapter((torch.zeros(1, 3, 2, 2), ) * 2, (torch.zeros(1, 4, 2, 2), ) * 2)
