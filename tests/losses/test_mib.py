import math

import pytest
import torch

from kd_mm.losses.mib import merged_log_softmax
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

#: In the sweep both sides have six channels: three of them are old.
SWEEP = {
    'MiBCELoss': dict(options=dict(old_classes=3, size='logits'), skip=dict(
        test_zero_for_equal_inputs='a cross-entropy with labels')),
    'MiBKDLoss': dict(options=dict(old_classes=3), skip=dict(
        test_zero_for_equal_inputs='three of the six classes are new to the teacher'))}


def ce(student, old, labels, **options):
    loss = build(dict(dict(type='MiBCELoss', loss_weight=1.0), **options))
    return loss(student, torch.zeros(len(student), old, *student.shape[2:]).double(),
                KDBatch(seg_map=torch.tensor(labels)))


def test_background_is_any_old_class():
    # Four even channels, two of them old: p(background) = 1/2, p(new) = 1/4.
    student = torch.zeros(1, 4, 1, 4).double()
    expected = (2 * math.log(2) + math.log(4)) / 3
    assert ce(student, 2, [[[0, 1, 3, 255]]]).item() == pytest.approx(expected, rel=1e-12)
    assert ce(student, 2, [[[0, 1, 3, 255]]], divisor='all').item() == pytest.approx(expected * 3 / 4, rel=1e-12)
    assert ce(student, 2, [[[0, 1, 3, 77]]]).item() == pytest.approx(expected, rel=1e-12)  # nobody knows class 77


def test_an_old_object_that_is_recognised_costs_nothing():
    student = torch.tensor([-20.0, 20.0, -20.0]).double().view(1, 3, 1, 1).requires_grad_()
    assert ce(student, 2, [[[0]]]).item() < 1e-12
    plain = torch.nn.functional.cross_entropy(student, torch.zeros(1, 1, 1).long())
    assert plain.item() > 10


def test_logits_meet_labels_at_the_size_of_either():
    student = torch.randn(1, 3, 2, 2).double()
    labels = torch.randint(0, 3, (1, 4, 4)).tolist()
    large = torch.nn.functional.interpolate(student, size=(4, 4), mode='bilinear')
    torch.testing.assert_close(ce(student, 2, labels), ce(large, 2, labels))
    small = [[row[::2] for row in labels[0][::2]]]
    torch.testing.assert_close(ce(student, 2, labels, size='logits'), ce(student, 2, small))


def test_new_classes_are_background_for_the_teacher():
    # Teacher: 3/4 background, 1/4 class 1. Student: 1/4 background, 1/4 class 1, 1/2 new: the same.
    teacher = torch.tensor([math.log(3), 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    student = torch.tensor([0.0, 0.0, math.log(2)], dtype=torch.float64).view(1, 3, 1, 1)
    loss = build(dict(type='MiBKDLoss', loss_weight=1.0))
    assert loss(student, teacher).item() == pytest.approx(0, abs=1e-12)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    found = build(dict(type='MiBKDLoss', divergence='cross_entropy', loss_weight=1.0))(student, teacher)
    assert found.item() == pytest.approx(entropy / 2, rel=1e-12)
    # The biased one wants the old channels alone to be 3 to 1, which they are not.
    biased = build(dict(type='MiBKDLoss', unbiased=False, loss_weight=1.0))(student, teacher)
    assert biased.item() == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2, rel=1e-12)


def test_without_a_new_class_it_is_a_divergence():
    student, teacher = torch.randn(2, 5, 3, 4).double(), torch.randn(2, 5, 3, 4).double()
    plain = build(dict(type='SoftmaxKDLoss', reduction='element_mean'))
    torch.testing.assert_close(build(dict(type='MiBKDLoss', loss_weight=1.0))(student, teacher),
                               plain(student, teacher))


def test_alpha_sharpens_the_teacher_alone():
    student, teacher = torch.randn(1, 4, 2, 2).double(), torch.randn(1, 3, 2, 2).double()
    found = [build(dict(type='MiBKDLoss', alpha=alpha))(student, side)
             for alpha, side in ((2.0, teacher), (1.0, 2 * teacher))]
    torch.testing.assert_close(*found)


def test_ignored_pixels_and_blocks(monkeypatch):
    student, teacher = torch.randn(1, 5, 4, 6).double().requires_grad_(), torch.randn(1, 3, 4, 6).double()
    labels = torch.randint(0, 5, (1, 4, 6))
    labels[0, :2] = 255
    loss = build(dict(type='MiBKDLoss'))
    whole = loss(student, teacher, KDBatch(seg_map=labels))
    torch.testing.assert_close(whole, loss(student[:, :, 2:], teacher[:, :, 2:]))
    gradient, = torch.autograd.grad(whole, student)
    monkeypatch.setattr('kd_mm.ops.blocks.BLOCK', 20)
    again, = torch.autograd.grad(loss(student, teacher, KDBatch(seg_map=labels)), student)
    torch.testing.assert_close(again, gradient)


def test_merged():
    logits = torch.randn(2, 5, 3).double()
    merged = torch.tensor([True, False, False, True, True])
    p = logits.softmax(dim=1)
    expected = torch.stack([p[:, 0] + p[:, 3] + p[:, 4], p[:, 1], p[:, 2]], dim=1)
    torch.testing.assert_close(merged_log_softmax(logits, merged).exp(), expected)


@pytest.mark.parametrize('name, shapes, message', [
    ('MiBCELoss', (3, 3), 'the student needs 4 channels or more'),
    ('MiBKDLoss', (3, 4), 'the student needs 4 channels'),
    ('MiBCELoss', (2, 4), 'old classes first'), ('MiBKDLoss', (3, 1), '2 are needed')])
def test_channels_that_do_not_fit(name, shapes, message):
    own, theirs = (torch.zeros(1, channels, 2, 2) for channels in shapes)
    with pytest.raises(ValueError, match=message):
        build(dict(type=name))(own, theirs, KDBatch(seg_map=torch.zeros(1, 2, 2).long()))


@pytest.mark.parametrize('name, options, message', [
    ('MiBCELoss', dict(size='input'), "size='input'"), ('MiBCELoss', dict(divisor='mean'), "divisor='mean'"),
    ('MiBCELoss', dict(old_classes=0), 'old_classes=0'), ('MiBKDLoss', dict(alpha=0), 'alpha=0'),
    ('MiBKDLoss', dict(divergence='js'), "divergence='js'"), ('MiBKDLoss', dict(unbiased='no'), "unbiased='no'")])
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type=name, **options))


def test_rows_are_refused():
    with pytest.raises(ValueError, match='MiBKDLoss needs maps'):
        build(dict(type='MiBKDLoss'))(torch.zeros(3, 4), torch.zeros(3, 3))
