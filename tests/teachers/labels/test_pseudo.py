"""Which of a teacher's objects and pixels become labels, by hand."""

import pytest
import torch

from kd_mm.registry import MODELS, build
from kd_mm.teachers.labels.base import Labeller
from kd_mm.teachers.labels.pseudo import PseudoLabels
from kd_mm.types.batch import KDBatch
from kd_mm.types.labels import Detections, Pixels

TRUTH = torch.tensor([[0., 0., 10., 10.]])


def found(*rows, masks=False):
    """Detections of rows x1, y1, x2, y2, label, score."""
    table = torch.tensor(rows).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4].long(), table[:, 5],
                      torch.zeros(len(table), 64, 64, dtype=torch.bool) if masks else None)


def added(labeller, *teachers, boxes=TRUTH, ignored=None):
    batch = KDBatch(input_shape=(64, 64), boxes=[boxes])
    batch.targets.ignored = None if ignored is None else [torch.tensor(ignored)]
    result, = labeller.objects(batch, {str(number): [part] for number, part in enumerate(teachers)})
    return [] if result is None else [(box, label) for box, label in zip(
        result.boxes.int().tolist(), result.labels.tolist())]


def test_scores_and_overlaps():
    labeller = PseudoLabels(score=0.5, iou=0.5)
    rows = [(20., 20., 30., 30., 1, 0.51), (20., 20., 30., 30., 1, 0.5), (0., 0., 10., 5.1, 2, 0.9),
            (0., 0., 10., 4.9, 2, 0.9), (40., 40., 40., 50., 1, 0.9), (40., 40., 40.5, 50., 1, 0.9)]
    # exactly at the threshold, an IoU of 0.51 and of 0.49 (of another class), no area, too thin
    assert added(labeller, found(*rows)) == [([20, 20, 30, 30], 1), ([0, 0, 10, 4], 2)]
    assert labeller.counts['boxes'] == 2 and labeller.counts['score'] == pytest.approx((0.51 + 0.9) / 2)
    assert added(PseudoLabels(score=0.5, min_size=0.2), found(rows[5])) == [([40, 40, 40, 50], 1)]
    assert added(PseudoLabels(score=0.5, iou=0), found((9., 9., 30., 30., 0, 0.9), (10., 10., 30., 30., 0, 0.9))) == [
        ([10, 10, 30, 30], 0)]  # nothing that touches
    assert len(added(PseudoLabels(score=0.5, iou=1.0), found((0., 0., 10., 9.9, 0, 0.9)))) == 1
    assert added(labeller, found(), boxes=TRUTH[:0]) == [] and labeller.counts['boxes'] == 0


def test_ignored_regions():
    crowd = [[30., 30., 60., 60.]]
    rows = (25., 40., 35., 50., 0, 0.9), (25., 40., 34., 50., 0, 0.9)  # half of it inside; less
    labeller = PseudoLabels(score=0.5)
    assert added(labeller, found(*rows), ignored=crowd) == [([25, 40, 34, 50], 0)]
    assert added(labeller, found(rows[0]), ignored=crowd) == []
    assert added(PseudoLabels(score=0.5, inside=0.9), found(rows[0]), ignored=crowd) == [([25, 40, 35, 50], 0)]


def test_objects_that_two_teachers_see_are_added_once():
    first = found((20., 20., 40., 40., 1, 0.8), (20., 20., 40., 40., 2, 0.7), (50., 50., 60., 60., 1, 0.6))
    second = found((21., 20., 40., 40., 1, 0.9), (50., 50., 60., 60., 3, 0.9))
    assert added(PseudoLabels(score=0.5), first, second) == [
        ([20, 20, 40, 40], 2), ([50, 50, 60, 60], 1), ([21, 20, 40, 40], 1), ([50, 50, 60, 60], 3)]
    # of one teacher nothing is dropped: its own suppression has looked at it
    twice = found((20., 20., 40., 40., 1, 0.8), (20., 20., 40., 41., 1, 0.7))
    assert len(added(PseudoLabels(score=0.5), twice)) == 2
    assert len(added(PseudoLabels(score=0.5), twice, found((50., 50., 60., 60., 1, 0.6)))) == 3


def test_masks_go_with_their_objects():
    part = found((20., 20., 40., 40., 1, 0.8), (0., 0., 10., 10., 1, 0.8), masks=True)
    part.masks[0, 20:40, 20:40] = True
    batch = KDBatch(input_shape=(64, 64), boxes=[TRUTH])
    result, = PseudoLabels(score=0.5).objects(batch, dict(a=[part], b=[found(masks=True)]))
    assert result.masks.shape == (1, 64, 64) and result.masks.sum() == 400


def test_pixels():
    old = torch.tensor([[[255, 1, 0, 255], [255, 255, 0, 255]]])
    batch = KDBatch(input_shape=(2, 4), img_shapes=[(2, 3)], seg_map=old)  # the last column is padding
    first = Pixels(torch.full((1, 2, 4), 3), torch.tensor([[[0.9, 0.9, 0.9, 0.9], [0.5, 0.6, 0.9, 0.9]]]))
    second = Pixels(torch.full((1, 2, 4), 4), torch.full((1, 2, 4), 0.7))
    labeller = PseudoLabels(score=0.65)
    assert labeller.pixels(batch, dict(a=first)).tolist() == [[[3, 1, 0, 255], [255, 255, 0, 255]]]
    assert labeller.counts['pixels'] == 1 and labeller.counts['share'] == pytest.approx(1 / 3)
    assert labeller.pixels(batch, dict(a=first, b=second)).tolist() == [[[3, 1, 0, 255], [4, 4, 0, 255]]]
    assert PseudoLabels(score=0.65, fill=[0]).pixels(batch, dict(a=first)).tolist() == [
        [[255, 1, 3, 255], [255, 255, 3, 255]]]
    assert PseudoLabels(score=0.95).pixels(batch, dict(a=first)) is None
    assert batch.targets.seg_map is old and old[0, 0, 0] == 255


@pytest.mark.parametrize('options, message', [
    (dict(score='0.5'), "PseudoLabels: score='0.5' must be a finite number"),
    (dict(iou=-0.1), 'PseudoLabels: iou=-0.1'),
    (dict(inside=2), 'inside=2'), (dict(min_size=-1), 'min_size=-1'), (dict(fill=[-1]), 'fill'), (dict(fill=3), 'fill'),
    (dict(teacher=5), 'teacher=5 must be a text'), (dict(classes=5), 'classes=5 must be')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type='PseudoLabels', **options), Labeller, 'labeller')


def test_what_a_labeller_cannot():
    MODELS.import_from_location()
    part = [found((0., 0., 9., 9., 0, 0.9))]
    assert 'Labeller has no method objects(), so it labels nothing of detectors' in Labeller().fits(dict(a=part))
    assert 'no method pixels(), so it labels nothing of segmentors' in Labeller().fits(
        dict(a=Pixels(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))))
    assert PseudoLabels().fits(dict(a=part)) is None
    assert Labeller().check(False, dict(a=part)) is None
    assert "the teacher 'a' predicts boxes alone" in Labeller().check(True, dict(a=part))
