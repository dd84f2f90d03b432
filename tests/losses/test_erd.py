import pytest
import torch

from kd_mm.losses.erd import elastic_selection, suppressed
from kd_mm.registry import build
from kd_mm.types.dense import DenseView


def head(seed, classes, images=2, count=60, bins=6, sigmoid=True, **changes):
    """Low scores with a few that are high, as detectors have them."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, count, classes, generator=draw, dtype=torch.float64) * 2 - 4
    sides = torch.randn(images, count, 4, bins, generator=draw, dtype=torch.float64)
    corner = torch.rand(images, count, 2, generator=draw, dtype=torch.float64) * 100
    size = torch.rand(images, count, 2, generator=draw, dtype=torch.float64) * 40
    boxes = torch.cat([corner, corner + 5 + size], dim=-1)
    fields = dict(logits=[logits], boxes=[boxes], distributions=[sides], priors=[corner[0]], sigmoid=sigmoid)
    return DenseView(**dict(fields, **changes))


def loss(**options):
    return build(dict(dict(type='ERDLoss'), **options))


def test_selection_is_strict_and_unbiased():
    values = torch.tensor([0.0] * 9 + [1.0]).double()
    assert elastic_selection(values).nonzero().tolist() == [[9]]
    assert not elastic_selection(torch.ones(5)).any() and not elastic_selection(torch.ones(1)).any()
    edge = torch.tensor([0.0, 1.0]).double()
    assert not elastic_selection(edge, 0.5**0.5).any()  # exactly at the threshold


def test_closed_form_of_the_classes():
    student, teacher = head(1, 5), head(2, 3)
    chosen = [elastic_selection(values) for values in teacher.logits[0].sigmoid().amax(dim=2)]
    expected = sum((student.logits[0][image, index][:, :3] - teacher.logits[0][image, index]).square().mean()
                   for image, index in enumerate(chosen)) / 2
    torch.testing.assert_close(loss(box_weight=0)(student, teacher), expected)
    torch.testing.assert_close(loss(box_weight=0, reduction='sum')(student, teacher), 2 * expected)


def test_levels_are_one_list():
    student, teacher = head(1, 5), head(2, 3)

    def split(view):
        parts = {name: [piece for level in getattr(view, name) for piece in level.split([40, 20], dim=1)]
                 for name in ('logits', 'boxes', 'distributions')}
        return DenseView(**parts, priors=list(view.priors[0].split([40, 20])))

    torch.testing.assert_close(loss()(split(student), split(teacher)), loss()(student, teacher))


def test_closed_form_of_the_boxes():
    student, teacher = head(1, 5, images=1), head(2, 3, images=1)
    sure = elastic_selection(teacher.distributions[0][0].flatten(1).amax(dim=1)).nonzero()[:, 0]
    best, kind = teacher.logits[0][0].sigmoid().max(dim=1)
    left = sure[suppressed(teacher.boxes[0][0, sure], best[sure], kind[sure], 0.005)]
    assert 0 < len(left) <= len(sure)
    p, q = ((view.distributions[0][0, left] / 10).log_softmax(dim=-1) for view in (teacher, student))
    weight = student.logits[0][0, left, :3].sigmoid().amax(dim=1)
    expected = 0.25 / 4 * (100 * (p.exp() * (p - q)).mean(dim=-1) * weight[:, None]).sum()
    torch.testing.assert_close(loss(class_weight=0)(student, teacher), expected)
    whole = loss(class_weight=0, bins='sum')(student, teacher)
    torch.testing.assert_close(whole, expected * 6)


def test_the_nms_is_within_a_class():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 3)
    scores, kinds = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0, 0, 1])
    assert suppressed(boxes, scores, kinds, 0.5).tolist() == [1, 2]
    assert suppressed(boxes[:0], scores[:0], kinds[:0], 0.5).tolist() == []


def test_the_published_boxes_forget_the_stride():
    """Bins are a few pixels there: boxes of cells that are 100 pixels apart do not overlap, as the head's do."""
    points = torch.arange(60).double()[:, None].expand(60, 2) * 100
    large = torch.tensor([0.0, 0.0, 7000.0, 7000.0]).double().expand(1, 60, 4)
    student, teacher = (head(seed, 1, images=1, priors=[points], boxes=[large]) for seed in (1, 2))
    sure, kept = loss(std_factor=1).selections(teacher)[1:]
    published = loss(std_factor=1, decode='published').selections(teacher)[2]
    assert len(published[0]) == len(sure[0]) > len(kept[0])
    assert not torch.isclose(loss(std_factor=1, decode='published')(student, teacher),
                             loss(std_factor=1)(student, teacher))


def test_nothing_above_the_threshold_is_zero():
    """The published code has NaN there."""
    student, teacher = head(1, 5), head(2, 3)
    student.logits[0].requires_grad_()
    teacher.logits = (torch.zeros_like(teacher.logits[0]), )
    teacher.distributions = (torch.zeros_like(teacher.distributions[0]), )
    total = loss()(student, teacher)
    total.backward()
    assert total.item() == 0 and student.logits[0].grad.abs().sum() == 0


def test_standardised_boxes_have_no_scale():
    student, teacher = head(1, 5), head(2, 3)
    made = loss(class_weight=0, standardise=True)
    before = made(student, teacher)
    student.distributions = tuple(3 * level + 1 for level in student.distributions)
    torch.testing.assert_close(made(student, teacher), before, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match='leaves nothing but the order of 2 bins'):
        made(head(1, 5, bins=2), head(2, 3, bins=2))


def test_only_old_classes_get_a_gradient():
    student, teacher = head(1, 5), head(2, 3)
    student.logits[0].requires_grad_()
    loss()(student, teacher).backward()
    assert student.logits[0].grad[..., :3].abs().sum() > 0 and student.logits[0].grad[..., 3:].abs().sum() == 0


@pytest.mark.parametrize('student, teacher, options, message', [
    (dict(classes=2), dict(classes=3), {}, '2 class logits .* the classes must be the same'),
    (dict(classes=5), dict(classes=3, distributions=None), {}, 'predicts no box distributions'),
    (dict(classes=5), dict(classes=3, bins=9), {}, 'need the same reg_max'),
    (dict(classes=5, sigmoid=False), dict(classes=3, sigmoid=False), {}, 'softmax classes'),
    (dict(classes=5), dict(classes=3, boxes=None), {}, 'predicts no boxes'),
    (dict(classes=5), dict(classes=3, priors=None), dict(decode='published'), 'needs the priors')])
def test_heads_that_do_not_fit(student, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        loss(**options)(make(1, student), make(2, teacher))


def make(seed, fields):
    fields = dict(fields)
    classes = fields.pop('classes')
    changes = {key: fields.pop(key) for key in ('distributions', 'boxes', 'priors') if key in fields}
    view = head(seed, classes, **fields)
    for name, value in changes.items():
        setattr(view, '_boxes' if name == 'boxes' else name, value)
    return view


@pytest.mark.parametrize('options, message', [
    (dict(tau=0), 'tau=0'), (dict(iou=2), 'iou=2'), (dict(bins='max'), "bins='max'"),
    (dict(decode='bins'), "decode='bins'"), (dict(reduction='none'), "reduction='none'"),
    (dict(class_weight=0, box_weight=0), 'one above 0')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        loss(**options)


def test_without_boxes_any_dense_head_will_do():
    student, teacher = make(1, dict(classes=5, distributions=None)), make(2, dict(classes=3, distributions=None))
    assert loss(box_weight=0)(student, teacher) > 0
