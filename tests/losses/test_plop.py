import math

import pytest
import torch

from kd_mm.losses.plop import bands, entropy_histogram, histogram_medians, label_entropy, local_pod, plop_labels
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

SWEEP = {'PLOPPseudoLabelLoss': dict(options=dict(size='logits'), skip=dict(
    test_zero_for_equal_inputs='a cross-entropy with labels',
    test_prepare_twice_changes_nothing='the histogram is state that a step writes'))}


def pod(student, teacher, **options):
    return build(dict(dict(type='LocalPODLoss', loss_weight=1.0), **options))(student, teacher)


def embedding(features, scales):
    """The numbers of all cells, cell by cell, for sides that the scales divide."""
    found = []
    height, width = features.shape[2:]
    for scale in scales:
        for down in range(scale):
            for across in range(scale):
                cell = features[:, :, down * height // scale:(down + 1) * height // scale,
                                across * width // scale:(across + 1) * width // scale]
                found += [cell.mean(dim=3).flatten(1), cell.mean(dim=2).flatten(1)]
    return torch.cat(found, dim=1)


def test_closed_form():
    # Squares (1, 9; 25, 49): means along rows 5 and 37, along columns 13 and 29, against zeros.
    student = torch.tensor([[1.0, 3.0], [5.0, 7.0]]).double().view(1, 1, 2, 2)
    expected = math.sqrt(5**2 + 37**2 + 13**2 + 29**2)
    assert pod(student, student * 0, scales=[1]).item() == pytest.approx(expected, rel=1e-12)
    # A 2x2 grid: each cell is a value of its own, twice.
    cells = math.sqrt(expected**2 + 2 * (1 + 81 + 625 + 2401))
    assert pod(student, student * 0, scales=[1, 2]).item() == pytest.approx(cells, rel=1e-12)


@pytest.mark.parametrize('size', [(8, 8), (8, 12), (7, 5), (9, 4)])
def test_the_numbers_are_those_of_the_cells(size):
    student, teacher = torch.randn(2, 3, *size).double(), torch.randn(2, 3, *size).double()
    gap = embedding(teacher.square(), (1, 2, 4)) - embedding(student.square(), (1, 2, 4))
    torch.testing.assert_close(pod(student, teacher), gap.norm(dim=1).mean())


def test_published_cells_do_not_read_the_lower_part():
    student, teacher = torch.randn(1, 2, 9, 4).double(), torch.randn(1, 2, 9, 4).double()
    moved = student.clone()
    moved[:, :, 4:] += 5
    assert torch.equal(pod(moved, teacher, cells='width'), pod(student, teacher, cells='width'))
    assert not torch.isclose(pod(moved, teacher), pod(student, teacher), rtol=1e-3)
    low = torch.randn(1, 2, 2, 16).double()  # where the reference has empty cells and NaN
    assert torch.isfinite(pod(low, low * 2, cells='width'))
    square = torch.randn(1, 2, 8, 8).double()
    torch.testing.assert_close(pod(square, square * 2, cells='width'), pod(square, square * 2))


def test_bands_cover_a_side():
    for length in range(1, 12):
        for count in (1, 2, 3, 4):
            found = bands(length, None, count)
            assert [start for start, _ in found][1:] == [end for _, end in found][:-1]
            assert found[0][0] == 0 and found[-1][1] == length
    assert local_pod(torch.zeros(1, 1, 3, 0 + 1), [1, 2])[1][0].shape == (1, 1, 1, 3)


@pytest.mark.parametrize('extra, expected', [('sum', (1 + 4)**2 - 9), ('trim', 1 - 9)])
def test_new_logits_go_to_the_background(extra, expected):
    student = torch.tensor([1.0, 2.0, 4.0]).double().view(1, 3, 1, 1)
    teacher = torch.tensor([3.0, 2.0]).double().view(1, 2, 1, 1)
    found = pod(student, teacher, growth=(2, 1), extra=extra, scales=[1], schedule=False)
    assert found.item() == pytest.approx(math.sqrt(2) * abs(expected), rel=1e-12)
    again = pod(student, teacher, growth=(2, 1), extra=extra, scales=[1])
    assert again.item() == pytest.approx(found.item() * math.sqrt(3 / 1), rel=1e-12)


def test_channels_that_do_not_fit():
    for options, shapes in ((dict(), (3, 2)), (dict(growth=(2, 2)), (3, 2)), (dict(growth=(2, 1)), (2, 3))):
        own, theirs = (torch.zeros(1, channels, 2, 2) for channels in shapes)
        with pytest.raises(ValueError, match='LocalPODLoss, level 0: student .* differ in channels'):
            pod(own, theirs, **options)
    with pytest.raises(ValueError, match='LocalPODLoss needs maps'):
        pod(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize('options, message', [
    (dict(scales=[0]), r'scales\[0\]=0'), (dict(cells='height'), "cells='height'"),
    (dict(growth=4), 'growth=4'), (dict(extra='mean'), "extra='mean'"), (dict(schedule='no'), "schedule='no'")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type='LocalPODLoss', **options))


# ------------------------------------------------------------------ pseudo labels


def sure(*classes, count=3, how=20.0):
    """Teacher logits that are sure of these classes, (1, count, 1, W)."""
    return how * torch.nn.functional.one_hot(torch.tensor(classes), count).double().t().reshape(1, count, 1, -1)


def test_entropy():
    even = torch.full((1, 4, 1, 1), 0.25).double()
    assert label_entropy(even, 6).item() == pytest.approx(1.0, rel=1e-6)
    published = math.log(4) / 4 / math.log(4) / math.log(6)
    assert label_entropy(even, 6, 'published').item() == pytest.approx(published, rel=1e-6)
    assert label_entropy(sure(1, how=100).softmax(dim=1), 6).item() == 0


def test_the_median_is_one():
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(4001, generator=draw).double()
    histogram = entropy_histogram(values, torch.zeros(4001).long(), torch.ones(4001).bool(), 1)
    assert histogram.sum() == 4001
    assert histogram_medians(histogram).item() == pytest.approx(values.median().item(), abs=1e-3)
    assert histogram_medians(torch.tensor([[0, 4, 0, 0], [1, 0, 0, 1]])).tolist() == [0.375, 0.25]


def test_the_published_median_adds_up_bin_numbers():
    # Half is 8; the numbers 0, 1, 2, 3 add up to 0, 0, 1, 3: stops at bin 3, where 3 <= 8 <= 3 + 10.
    histogram = torch.tensor([[2, 2, 2, 10]])
    assert histogram_medians(histogram, 'published').item() == pytest.approx((3 + (8 - 3) / 10) / 4)
    assert histogram_medians(histogram).item() == pytest.approx((3 + (8 - 6) / 10) / 4)
    assert histogram_medians(torch.tensor([[0, 0, 0, 0], [50, 50, 0, 0], [5, 5, 5, 0]]), 'published').tolist()[:2] == [
        0.0, 0.25]
    assert histogram_medians(torch.tensor([[10, 90, 0, 0] + [0] * 96]).repeat(1, 1), 'published')[0].isfinite()
    lost = torch.tensor([[100, 0, 100, 0]])  # half is 100: bin 0 has it at once
    assert histogram_medians(lost, 'published').item() == pytest.approx(0.25)
    never = torch.tensor([[3, 1, 3, 3]])  # 0+3 < 5, 0+1 < 5, 1+3 < 5, 3+3 >= 5
    assert histogram_medians(never, 'published').item() == pytest.approx((3 + 2 / 3) / 4)
    assert histogram_medians(torch.tensor([[9, 0, 0, 9, 200, 0]]).flip(1), 'published')[0] != 0


def test_labels_of_the_old_model():
    labels = torch.tensor([[[0, 0, 3, 255, 1]]])
    p = sure(2, 1, 1, 1, 0).softmax(dim=1)
    entropy = torch.tensor([[[0.0, 0.5, 0.0, 0.0, 0.3]]])
    new, share = plop_labels(labels, p, entropy, torch.tensor([0.4, 0.4, 0.4]))
    assert new.tolist() == [[[2, 255, 3, 255, 0]]]
    assert share.item() == pytest.approx(2 / 3, rel=1e-6)


def test_closed_form_of_the_loss():
    # Even student of four classes: log 4 a pixel. Two of three candidates are sure, the new class counts as it is.
    labels, teacher = torch.tensor([[[0, 0, 3, 255, 1]]]), sure(2, 1, 1, 1, 0)
    teacher[0, :, 0, 1] = torch.tensor([0.0, 1.0, 0.0])
    student = torch.zeros(1, 4, 1, 5).double()
    batch = KDBatch(seg_map=labels)
    limits = dict(type='PLOPPseudoLabelLoss', thresholds=[0.4] * 3)
    whole = 3 * math.log(4) / 4
    share = 2 / (3 + 1e-6)
    assert build(dict(limits, adaptive=False))(student, teacher, batch).item() == pytest.approx(whole, rel=1e-9)
    assert build(limits)(student, teacher, batch).item() == pytest.approx(whole * share, rel=1e-9)
    assert build(dict(limits, divisor='all'))(student, teacher, batch).item() == pytest.approx(
        whole * share * 4 / 5, rel=1e-9)


def test_the_histogram_grows_once_a_step_and_in_training():
    loss, teacher = build(dict(type='PLOPPseudoLabelLoss')), sure(2, 1, 0)
    student, batch = torch.zeros(1, 4, 1, 3).double(), KDBatch(seg_map=torch.tensor([[[0, 3, 0]]]), step=1)
    for _ in range(2):
        loss(student, teacher, batch)
        assert loss.histograms[0].counts[:, 0].tolist() == [1, 0, 1]
    loss(student, teacher, KDBatch(seg_map=torch.tensor([[[0, 3, 0]]]), step=2))
    assert loss.histograms[0].counts[:, 0].tolist() == [2, 0, 2]
    loss.eval()(student, teacher, KDBatch(seg_map=torch.tensor([[[0, 3, 0]]]), step=3))
    assert loss.histograms[0].counts.sum() == 4


def test_old_channels_of_a_larger_teacher():
    student, teacher = torch.randn(1, 4, 2, 2).double(), torch.randn(1, 4, 2, 2).double()
    batch = KDBatch(seg_map=torch.tensor([[[0, 3], [1, 2]]]))
    some = build(dict(type='PLOPPseudoLabelLoss', old_classes=2))(student, teacher, batch)
    torch.testing.assert_close(some, build(dict(type='PLOPPseudoLabelLoss'))(student, teacher[:, :2], batch))


@pytest.mark.parametrize('options, message', [
    (dict(thresholds=[0.1, 'x']), r'thresholds\[1\]'), (dict(threshold=-1), 'threshold=-1'), (dict(bins=1), 'bins=1'),
    (dict(median='mean'), "median='mean'"), (dict(entropy='max'), "entropy='max'"),
    (dict(old_classes=1), 'old_classes=1')])
def test_bad_options_of_the_labels(options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type='PLOPPseudoLabelLoss', **options))


def test_thresholds_and_channels_that_do_not_fit():
    batch, old = KDBatch(seg_map=torch.zeros(1, 2, 2).long()), torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match='thresholds=.* must be 3 numbers'):
        build(dict(type='PLOPPseudoLabelLoss', thresholds=[0.1]))(torch.zeros(1, 4, 2, 2), old, batch)
    with pytest.raises(ValueError, match='the student needs 3 channels or more'):
        build(dict(type='PLOPPseudoLabelLoss'))(torch.zeros(1, 2, 2, 2), old, batch)
