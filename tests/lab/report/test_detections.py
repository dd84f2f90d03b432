"""Errors of detectors, on boxes whose errors are known by construction."""

import numpy as np
import pytest

from kd_mm.lab.report.detections import (
    KINDS,
    MISSED,
    Image,
    average_precision,
    best_threshold,
    confidence,
    error_types,
    judge,
    precision_recall,
    same_detections,
    side_by_side,
)

CLASSES = ('cat', 'dog', 'cow')
#: Far from each other: 100 x 100 each.
PLACES = [(200 * index, 0, 200 * index + 100, 100) for index in range(8)]


def image(truth=(), found=(), ignored=()):
    """``truth``: (box, label); ``found``: (box, label, score); ``ignored``: indices of the truth."""
    return Image(np.array([box for box, _ in truth], float).reshape(-1, 4),
                 np.array([label for _, label in truth], int),
                 np.isin(np.arange(len(truth)), ignored), np.array([box for box, _, _ in found], float).reshape(-1, 4),
                 np.array([score for _, _, score in found], float), np.array([label for _, label, _ in found], int))


def shifted(box, right):
    """The box moved by a part of its width: the overlap is (1 - right) / (1 + right)."""
    return box[0] + 100 * right, box[1], box[2] + 100 * right, box[3]


def one_of_each():
    """One error of each type and one right detection; the sixth object is missed."""
    truth = [(PLACES[index], index % 3) for index in range(6)]
    found = [
        (PLACES[0], 0, 0.9),  # right
        (PLACES[0], 0, 0.8),  # duplicate
        (PLACES[1], 2, 0.7),  # the wrong class: the object is a dog
        (shifted(PLACES[2], 0.5), 2, 0.6),  # an overlap of a third
        (shifted(PLACES[3], 0.5), 1, 0.5),  # a third, and the wrong class
        (PLACES[7], 0, 0.4),  # nothing there
    ]
    return [image(truth, found)]


def test_each_type_is_counted_once():
    judged = judge(one_of_each())
    assert judged.kind.tolist() == ['right', 'duplicate', 'classification', 'localisation', 'both', 'background']
    assert judged.about.tolist() == [0, 0, 1, 2, -1, -1]
    errors = error_types(judged, 3)
    # objects 3, 4 and 5: one has a detection of another class at another place, two have nothing
    assert errors['counts'] == {**dict.fromkeys(KINDS, 1), MISSED: 3} and errors['right'] == 1


def test_a_threshold_takes_away_what_lies_below_it():
    errors = error_types(judge(one_of_each()), 3, threshold=0.65)
    assert errors['counts'] == {'classification': 1, 'localisation': 0, 'both': 0, 'duplicate': 1, 'background': 0,
                                'missed': 4}


@pytest.mark.parametrize('kind', KINDS)
def test_counts_by_construction(kind):
    """Several images with so many errors of one type."""
    made = {'classification': (PLACES[1], 1, 0.5), 'localisation': (shifted(PLACES[1], 0.4), 0, 0.5),
            'both': (shifted(PLACES[1], 0.4), 1, 0.5), 'duplicate': (PLACES[0], 0, 0.5),
            'background': (PLACES[5], 0, 0.5)}[kind]
    images = [image([(PLACES[0], 0), (PLACES[1], 0)], [(PLACES[0], 0, 0.9), made]) for _ in range(4)]
    images += [image([(PLACES[0], 0)], [(PLACES[0], 0, 0.9)])]
    counts = error_types(judge(images), 3)['counts']
    assert {name: counts[name] for name in KINDS} == {**dict.fromkeys(KINDS, 0), kind: 4}
    # nobody has looked at the second object where the error is not about it
    assert counts[MISSED] == (0 if kind in ('classification', 'localisation') else 4)


def test_what_an_oracle_would_gain():
    """One class: 4 objects, 2 found; the cost of each type by hand."""
    truth = [(PLACES[index], 0) for index in range(4)]
    found = [(PLACES[0], 0, 0.9), (shifted(PLACES[1], 0.4), 0, 0.8), (PLACES[2], 0, 0.7), (PLACES[2], 0, 0.6)]
    errors = error_types(judge([image(truth, found)]), 1)
    half = 51 / 101  # recalls up to 0.5, of 101 points
    base = (26 + 25 * 2 / 3) / 101
    assert errors['ap50'] == pytest.approx(base)
    assert errors['cost']['localisation'] == pytest.approx(76 / 101 - base)  # 3 of 4 found, without a false one before
    assert errors['cost']['duplicate'] == pytest.approx(0, abs=1e-9)  # it comes last
    # three objects are left, of which two are found
    assert errors['cost'][MISSED] == pytest.approx((34 + 33 * 2 / 3) / 101 - base)
    assert errors['cost']['background'] == errors['cost']['both'] == errors['cost']['classification'] == 0
    assert errors['ap50'] < half


def test_mending_a_class_needs_an_object_that_nobody_has_found():
    both = image([(PLACES[0], 0)], [(PLACES[0], 0, 0.9), (PLACES[0], 1, 0.95)])
    errors = error_types(judge([both]), 2)
    assert errors['counts']['classification'] == 1 and errors['ap50'] == 1.0 and errors['cost']['classification'] == 0
    # nor does it count as a second object
    other = image([(PLACES[0], 0), (PLACES[4], 0)], [(PLACES[0], 0, 0.9), (PLACES[0], 1, 0.95)])
    assert error_types(judge([other]), 2)['cost']['classification'] == 0
    alone = image([(PLACES[0], 0)], [(PLACES[0], 1, 0.95), (PLACES[0], 2, 0.6)])
    errors = error_types(judge([alone]), 3)
    assert errors['counts']['classification'] == 2 and errors['cost']['classification'] == 1.0


def test_the_better_overlap_and_the_better_score_go_first():
    objects = [(PLACES[0], 0), (shifted(PLACES[0], 0.2), 0)]
    judged = judge([image(objects, [(shifted(PLACES[0], 0.15), 0, 0.6), (shifted(PLACES[0], 0.18), 0, 0.9)])])
    assert judged.score.tolist() == [0.9, 0.6] and judged.about.tolist() == [1, 0] and set(judged.kind) == {'right'}


def test_ignored_objects_count_neither_way():
    crowd = image([(PLACES[0], 0), ((0, 0, 1000, 1000), 0)], [(PLACES[0], 0, 0.9), (PLACES[3], 0, 0.8)], ignored=[1])
    judged = judge([crowd])
    assert judged.kind.tolist() == ['right', 'ignored'] and len(judged.truth) == 1
    errors = error_types(judged, 1)
    assert sum(errors['counts'].values()) == 0 and errors['ap50'] == 1.0
    assert confidence(judged)['count'][9] == 1


def test_images_without_objects_or_detections():
    images = [image(), image(found=[(PLACES[0], 1, 0.3)]), image([(PLACES[0], 1)])]
    errors = error_types(judge(images), 3)
    assert errors['counts']['background'] == 1 and errors['counts'][MISSED] == 1 and errors['ap50'] == 0
    assert best_threshold(judge(images)) == dict(score=0.5, f1=0.0, precision=0.0, recall=0.0)
    assert judge([]).kind.shape == (0, )
    found = precision_recall([image([(PLACES[0], 1)])], CLASSES)
    assert found['ap'] == 0 and found['classes'][0]['ap'] is None and found['sizes']['small'] is None


def random_images(seed, count=12):
    draw = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        corner = draw.uniform(0, 150, (int(draw.integers(1, 7)), 2))
        truth = np.concatenate([corner, corner + draw.uniform(10, 120, corner.shape)], axis=1)
        labels = draw.integers(0, 3, len(truth))
        rows = draw.integers(0, len(truth), int(draw.integers(1, 14)))
        boxes = truth[rows] + draw.normal(0, 8, (len(rows), 4))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
        found = np.where(draw.random(len(rows)) < 0.7, labels[rows], draw.integers(0, 3, len(rows)))
        images.append(Image(truth, labels, draw.random(len(truth)) < 0.1, boxes, draw.random(len(rows)), found))
    return images


@pytest.mark.parametrize('seed', range(4))
def test_average_precision_is_that_of_coco(seed):
    """Both ways to the same number: our matching, and pycocotools."""
    images = random_images(seed)
    found = precision_recall(images, CLASSES)
    assert error_types(judge(images), 3)['ap50'] == pytest.approx(found['ap50'], abs=1e-6)
    judged = judge(images)
    for index, entry in enumerate(found['classes']):
        chosen = (judged.label == index) & (judged.kind != 'ignored')
        own = average_precision(judged.score[chosen], judged.kind[chosen] == 'right',
                                int((judged.truth == index).sum()))
        assert own == pytest.approx(entry['ap50'], abs=1e-6)
        assert entry['objects'] == (judged.truth == index).sum()
        assert entry['curve'][0] >= entry['curve'][-1] and len(entry['curve']) == 21


@pytest.mark.parametrize('seed', range(3))
def test_every_detection_is_something_and_no_oracle_harms(seed):
    images = random_images(seed)
    judged = judge(images)
    errors = error_types(judged, 3)
    assert errors['right'] + sum(errors['counts'][kind] for kind in KINDS) + (judged.kind == 'ignored').sum() == sum(
        len(one.scores) for one in images)
    assert all(value >= -1e-9 for value in errors['cost'].values()) and max(errors['cost'].values()) > 0


def test_the_best_score_to_work_at():
    images = [image([(PLACES[0], 0), (PLACES[1], 0)], [
        (PLACES[0], 0, 0.9), (PLACES[1], 0, 0.5), (PLACES[4], 0, 0.4), (PLACES[5], 0, 0.3)])]
    assert best_threshold(judge(images)) == dict(score=0.5, f1=1.0, precision=1.0, recall=1.0)


def test_a_threshold_takes_all_of_one_score():
    images = [image([(PLACES[0], 0)], [(PLACES[0], 0, 0.5), (PLACES[4], 0, 0.5)])]
    found = best_threshold(judge(images))
    assert found['score'] == 0.5 and found['precision'] == 0.5 and found['f1'] == pytest.approx(2 / 3)


def test_calibration_of_boxes():
    right = [(PLACES[index], 0, 0.75) for index in range(3)]
    images = [image([(PLACES[index], 0) for index in range(3)], [*right, (PLACES[5], 0, 0.75), (PLACES[6], 0, 0.04)])]
    found = confidence(judge(images))
    assert found['ece'] == pytest.approx(0) and sum(found['count']) == 4  # 3 of 4 are right; 0.04 is not counted
    images = [image([(PLACES[0], 0)], [(PLACES[0], 0, 0.95), (PLACES[5], 0, 0.95)])]
    found = confidence(judge(images))
    assert found['ece'] == pytest.approx(0.45) and found['gap'] == pytest.approx(0.45)


def test_who_finds_what():
    small, large = (0, 0, 20, 20), PLACES[3]
    truth = [(PLACES[1], 0), (small, 0), (large, 1), (PLACES[5], 1)]
    student = image(truth, [(PLACES[1], 0, 0.9), (PLACES[5], 1, 0.9)])
    teacher = image(truth, [(PLACES[1], 0, 0.9), (small, 0, 0.9), (PLACES[7], 1, 0.9)])
    judged = [judge([one]) for one in (student, teacher)]
    table = side_by_side(judged[0].hit(), judged[1].hit(), judged[0], 2)
    assert table['classes'] == [dict(both=1, teacher=1, student=0, neither=0),
                                dict(both=0, teacher=0, student=1, neither=1)]
    assert table['sizes']['small'] == dict(both=0, teacher=1, student=0, neither=0)
    assert sum(sum(row.values()) for row in table['sizes'].values()) == 4
    assert same_detections(student, teacher, (0.5, 0.5)) == (1, 3)
    assert same_detections(student, teacher, (0.95, 0.5)) == (0, 3)
