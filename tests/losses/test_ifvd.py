import pytest
import torch
from tensors import Given, by_differences, draw

from kd_mm.losses.ifvd import class_similarity
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def value(student, teacher, labels, region=None, **options):
    loss = build(dict(type='IFVDLoss', loss_weight=1.0, **options))
    return loss(student, teacher, KDBatch(seg_map=labels), region).item()


def by_loops(features, labels):
    """Cosine with the class mean of the image, the plain way."""
    result = torch.ones(labels.shape, dtype=features.dtype)
    for image in range(len(labels)):
        for label in set(labels[image].flatten().tolist()) - {255}:
            chosen = labels[image] == label
            centre = features[image][:, chosen].mean(dim=1)
            cosine = torch.nn.functional.cosine_similarity(features[image], centre[:, None, None], dim=0)
            result[image][chosen] = cosine[chosen]
    return result


LABELS = torch.tensor([[[0, 0, 2], [4, 255, 2]], [[1, 1, 1], [1, 0, 255]]])


def test_closed_form():
    # Two cells of one class at right angles: cosine with their mean is 1/sqrt(2); equal in the teacher: 1.
    student = torch.eye(2).view(1, 2, 1, 2).double()
    teacher = torch.ones(1, 3, 1, 2).double()
    expected = (1 - 0.5**0.5)**2
    assert value(student, teacher, torch.tensor([[[0, 0]]])) == pytest.approx(expected)
    assert value(student, teacher, torch.tensor([[[0, 1]]])) == pytest.approx(0.0, abs=1e-12)  # a cell a class


def test_equals_the_plain_way():
    student, teacher = draw(2, 3, 2, 3), draw(2, 5, 2, 3, seed=1)
    gap = (by_loops(student, LABELS) - by_loops(teacher, LABELS)).square()
    assert value(student, teacher, LABELS) == pytest.approx(gap.sum().item() / 10, rel=1e-12)
    assert value(student, teacher, LABELS, count_ignored=True) == pytest.approx(gap.mean().item(), rel=1e-12)
    assert value(student, teacher, LABELS, num_classes=9) == pytest.approx(gap.sum().item() / 10, rel=1e-12)
    some = LABELS.masked_fill(LABELS == 4, 255)
    assert value(student, teacher, LABELS, num_classes=4) == pytest.approx(value(student, teacher, some), rel=1e-12)


def test_a_cell_without_class_is_its_own_centre():
    found = class_similarity(draw(1, 3, 1, 2), torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]).double())
    assert found[0].tolist() == pytest.approx([1.0, 1.0])


def test_centres_of_the_batch():
    student, teacher = draw(2, 3, 2, 3), draw(2, 5, 2, 3, seed=1)
    rows = [tensor.transpose(0, 1).reshape(1, tensor.shape[1], 1, 12) for tensor in (student, teacher)]
    expected = value(*rows, LABELS.reshape(1, 1, 12))
    assert value(student, teacher, LABELS, centres='batch') == pytest.approx(expected, rel=1e-12)
    assert value(student, teacher, LABELS) != pytest.approx(expected, rel=1e-3)


def test_invariant_to_the_length_of_the_map():
    student, teacher = draw(2, 3, 2, 3), draw(2, 5, 2, 3, seed=1)
    assert value(7 * student, 0.1 * teacher, LABELS) == pytest.approx(value(student, teacher, LABELS), rel=1e-12)


def test_the_centre_has_gradient():
    student, teacher = draw(1, 2, 1, 2).requires_grad_(), draw(1, 2, 1, 2, seed=1)
    loss = build(dict(type='IFVDLoss'))
    batch = KDBatch(seg_map=torch.tensor([[[0, 0]]]))
    gradient, = torch.autograd.grad(loss(student, teacher, batch), student)
    assert torch.allclose(gradient, by_differences(lambda s: loss(s, teacher, batch), student), rtol=1e-6, atol=1e-9)


def test_labels_are_brought_to_the_size_of_the_map():
    student, teacher = draw(2, 3, 2, 3), draw(2, 5, 2, 3, seed=1)
    large = LABELS.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert value(student, teacher, large) == pytest.approx(value(student, teacher, LABELS), rel=1e-12)


def test_region_weighs_centres_and_mean():
    student, teacher = draw(2, 3, 2, 3), draw(2, 5, 2, 3, seed=1)
    mask = torch.zeros(2, 1, 2, 3)
    mask[:, :, :, 1:] = 3.0
    part = value(student[..., 1:], teacher[..., 1:], LABELS[..., 1:])
    assert value(student, teacher, LABELS, Given(mask)) == pytest.approx(part, rel=1e-12)
    counted = value(student[..., 1:], teacher[..., 1:], LABELS[..., 1:], count_ignored=True)
    assert value(student, teacher, LABELS, Given(mask), count_ignored=True) == pytest.approx(counted, rel=1e-12)
    # Weights 1 and 3 move the centre: cells (1, 0) and (0, 1) with centre (1, 3) / 4.
    members = torch.tensor([[[1.0], [3.0]]])
    found = class_similarity(torch.eye(2).view(1, 2, 1, 2), members)
    assert found[0].tolist() == pytest.approx([1 / 10**0.5, 3 / 10**0.5])


def test_nothing_labelled_is_zero():
    student = draw(2, 3, 2, 3).requires_grad_()
    loss = build(dict(type='IFVDLoss'))(student, draw(2, 5, 2, 3), KDBatch(seg_map=torch.full((2, 2, 3), 255)))
    loss.backward()
    assert loss.item() == 0.0 and student.grad.abs().sum() == 0
    with pytest.raises(ValueError, match='segmentation map'):
        build(dict(type='IFVDLoss'))(student, student)


@pytest.mark.parametrize('options', [dict(centres='class'), dict(num_classes=0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='IFVDLoss', **options))
