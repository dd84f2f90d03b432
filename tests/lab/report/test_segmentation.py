"""Errors of segmenters, on label maps whose errors are known by construction."""

import cv2
import numpy as np
import pytest

from kd_mm.lab.report import segmentation as measures

NAMES = ('road', 'car', 'sky')


def two_halves(size=64):
    truth = np.zeros((size, size), np.int64)
    truth[:, size // 2:] = 1
    return truth


def summary(truth, predicted, scores=None, names=NAMES):
    return measures.summary(measures.of_image(truth, predicted, scores, len(names)), names)


def test_a_perfect_map():
    truth = two_halves()
    found = summary(truth, truth, np.ones(truth.shape))
    assert found['miou'] == found['accuracy'] == found['boundary_iou'] == 1.0
    assert found['classes'][2]['iou'] is None and not found['mixed'] and found['calibration']['ece'] == 0
    assert all(row['error'] == 0 for row in found['distance'])


def test_confusion_and_mix_ups_by_count():
    truth = two_halves()
    predicted = truth.copy()
    predicted[:10, :10] = 2  # 100 pixels of road are sky
    predicted[:5, 60:64] = 0  # 20 pixels of car are road
    truth[63, :] = 255
    found = summary(truth, predicted)
    road, car = 63 * 32, 63 * 32
    assert [(pair['truth'], pair['predicted'], pair['pixels']) for pair in found['mixed']] == [
        ('road', 'sky', 100), ('car', 'road', 20)]
    assert found['mixed'][0]['share'] == pytest.approx(100 / road)
    assert found['classes'][0]['iou'] == pytest.approx((road - 100) / (road + 20))
    assert found['classes'][1]['accuracy'] == pytest.approx((car - 20) / car)
    assert found['classes'][2]['iou'] == 0.0  # there is none, and some was predicted: it counts, as with the host
    assert found['accuracy'] == pytest.approx(1 - 120 / (road + car))
    assert found['confusion'][0][2] == pytest.approx(100 / road, abs=1e-4)


def test_a_class_that_the_data_have_not_is_wrong_everywhere():
    """A model that knows more classes than the data, as one whose classes grow: no other class is blamed for it."""
    truth = two_halves()
    predicted = truth.copy()
    predicted[:, 60:] = 3  # 4 of 32 columns of car
    found = summary(truth, predicted, np.ones(truth.shape))
    assert found['classes'][0]['iou'] == 1.0 and found['classes'][2]['iou'] is None and not found['mixed']
    assert found['classes'][1]['iou'] == found['classes'][1]['accuracy'] == 28 / 32
    assert found['confusion'][1] == [0, 28 / 32, 0] and found['accuracy'] == 60 / 64
    assert found['boundary_iou'] < 1 and found['calibration']['gap'] == pytest.approx(4 / 64)
    beside = measures.side_by_side(truth, predicted, predicted, 3)
    assert beside.tolist() == [[64 * 32, 0, 0, 0], [64 * 28, 0, 0, 64 * 4], [0] * 4]


def test_errors_at_an_edge_and_inside():
    truth = two_halves()
    moved = np.zeros_like(truth)
    moved[:, 33:] = 1  # the edge is one pixel off: a column of 64
    rows = summary(truth, moved)['distance']
    assert [round(row['error'] * row['pixels']) for row in rows] == [64, 0, 0, 0, 0]
    assert sum(row['pixels'] for row in rows) == 64 * 64 and rows[0]['pixels'] == 64 * 4
    inside = truth.copy()
    inside[20:30, 2:12] = 1  # 20 pixels and more from the edge
    rows = summary(truth, inside)['distance']
    assert [round(row['error'] * row['pixels']) for row in rows] == [0, 0, 0, 0, 100]


def test_ignored_pixels_make_no_edge():
    truth = np.zeros((20, 20), np.int64)
    truth[:, 10:] = 255
    assert np.isinf(measures.edge_distance(truth)).all()
    predicted = np.ones_like(truth)
    assert summary(truth, predicted)['accuracy'] == 0 and summary(truth, np.zeros_like(truth))['miou'] == 1


@pytest.mark.parametrize('width', [1, 3])
def test_a_boundary_is_what_erosion_takes(width):
    mask = np.zeros((40, 50), np.uint8)
    cv2.circle(mask, (20, 20), 15, 1, -1)
    mask[30:, 40:] = 1  # reaches the edge of the image
    eroded = cv2.erode(np.pad(mask, 1), np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
    assert np.array_equal(measures.boundary_of(mask > 0, width), (mask > 0) & (eroded == 0))


def test_boundary_iou_sees_what_iou_does_not():
    truth = np.zeros((200, 200), np.int64)
    truth[50:150, 50:150] = 1
    off, hole = truth.copy(), truth.copy()
    off[:] = np.roll(truth, 3, axis=1)
    hole[80:104, 80:105] = 0  # as many wrong pixels, all of them inside
    at_edge, inside = summary(truth, off), summary(truth, hole)
    assert at_edge['accuracy'] == inside['accuracy'] == pytest.approx(1 - 600 / 40000)
    width = round(0.02 * np.hypot(200, 200))
    assert width == 6
    one, two = (measures.boundary_of(labels == 1, width) for labels in (truth, off))
    assert at_edge['classes'][1]['boundary_iou'] == pytest.approx((one & two).sum() / (one | two).sum())
    assert at_edge['classes'][1]['boundary_iou'] < 0.7 < at_edge['classes'][1]['iou']


def test_accuracy_by_the_size_of_segments():
    truth = np.zeros((200, 200), np.int64)
    truth[:10, :10] = 1  # small: 100 pixels
    truth[100:150, 100:150] = 1  # medium: 2500 pixels
    predicted = truth.copy()
    predicted[:10, :10] = 0
    found = summary(truth, predicted)
    assert found['sizes'] == dict(small=0.0, medium=1.0, large=1.0)
    assert found['classes'][1]['sizes'] == dict(small=0.0, medium=1.0, large=None)


def test_two_images_add_up():
    draw = np.random.default_rng(0)
    truth, predicted = draw.integers(0, 3, (2, 40, 40)), draw.integers(0, 3, (2, 40, 40))
    scores = draw.random((2, 40, 40))
    total = {}
    for index in range(2):
        total = measures.add(total, measures.of_image(truth[index], predicted[index], scores[index], 3))
    table = np.array([[((truth == row) & (predicted == column)).sum() for column in range(3)] for row in range(3)])
    assert np.array_equal(total['confusion'][:, :3], table) and not total['confusion'][:, 3].any()
    assert total['scores'][0].sum() == 3200
    assert measures.summary(total, NAMES)['accuracy'] == pytest.approx((truth == predicted).mean())


def test_calibration_of_pixels():
    truth = np.zeros((10, 100), np.int64)
    predicted = truth.copy()
    predicted[:, :20] = 1
    found = summary(truth, predicted, np.full(truth.shape, 0.9))['calibration']
    assert found['ece'] == pytest.approx(0.1) and found['gap'] == pytest.approx(0.1)  # 80 of 100 are right
    assert summary(truth, predicted)['calibration'] is None


def test_who_has_which_pixels():
    truth = np.array([[0, 0, 0, 0, 1, 1, 255]])
    student = np.array([[0, 0, 1, 1, 1, 0, 0]])
    teacher = np.array([[0, 1, 0, 1, 1, 1, 0]])
    assert measures.side_by_side(truth, student, teacher, 2).tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
