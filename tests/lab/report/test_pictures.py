"""Labels that can be read: in the picture, none over another, dark on bright and bright on dark."""

import base64
import itertools
import re
from pathlib import Path

import cv2
import numpy as np

from kd_mm.lab.report.page import render
from kd_mm.lab.report.pictures import (
    TEXT,
    WIDTH,
    Box,
    Panel,
    boxes_panel,
    data_url,
    map_panel,
    moved,
    place_labels,
    scaled,
)
from kd_mm.lab.report.plots import OTHERS, lines

ROOT = Path(__file__).resolve().parents[3]


def areas(labels):
    return [label.area for label in labels]


def crowd(count=60, seed=0):
    draw = np.random.default_rng(seed)
    corner = draw.uniform(0, 500, (count, 2))
    return [Box((*one, *(one + draw.uniform(10, 140, 2))), 'person 0.87', '#2fb36d') for one in corner.clip(max=460)]


def test_no_label_covers_another_or_leaves_the_picture():
    labels = place_labels(crowd(), (WIDTH, 480))
    assert 20 < len(labels) <= 60
    for one, two in itertools.combinations(areas(labels), 2):
        assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
    assert all(x1 >= 0 and y1 >= 0 and x2 <= WIDTH + 0.01 and y2 <= 480 + 0.01 for x1, y1, x2, y2 in areas(labels))


def test_the_most_important_boxes_have_their_labels():
    boxes = crowd()
    first = [box for box, label in zip(boxes, place_labels(boxes, (WIDTH, 480))) if label.text == box.text]
    assert first[:3] == boxes[:3]


def test_a_label_is_as_high_as_a_line_of_the_page():
    """On a phone a picture is 280 pixels wide or more: ten pixels for the letters."""
    label, = place_labels([Box((100, 100, 200, 200), 'cat', '#ffffff')], (WIDTH, 480))
    assert TEXT * 280 > 10 and label.area[3] - label.area[1] > TEXT * WIDTH and label.ink == '#000000'


def test_a_picture_grows_and_boxes_move_with_it():
    picture = scaled(np.zeros((100, 160, 3), np.uint8))
    assert picture.shape == (400, WIDTH, 3)
    assert moved((10, 20, 30, 40), (4.0, 4.0)) == (40.0, 80.0, 120.0, 160.0)


def decoded(panel):
    data = np.frombuffer(base64.b64decode(panel.image.split(',')[1]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]


def test_a_label_map_has_the_colours_of_its_classes():
    labels = np.zeros((60, 80), np.uint8)
    labels[:, 40:] = 1
    labels[50:] = 255
    picture = decoded(map_panel('truth', labels, [(200, 0, 0), (0, 0, 200)]))
    height, width = picture.shape[:2]
    assert width == WIDTH and height == 480
    for place, colour in (((100, 100), (200, 0, 0)), ((100, 500), (0, 0, 200)), ((470, 300), (128, 128, 128))):
        assert np.abs(picture[place].astype(int) - colour).max() < 12


def test_names_are_text_and_no_code():
    """Names of classes come from a user's data."""
    url = data_url(np.zeros((4, 4, 3), np.uint8))
    panel = boxes_panel('<b>', url, (WIDTH, 480), [Box((10, 50, 60, 90), '<script>', '#ff0000')])
    plain = Panel('image', url, (4, 4))
    example = dict(title='<i>.png', panels=[panel, plain])
    tasks = [dict(title='<u>', verdict='', plots=[], examples=[example])]
    text = render('demo.html', [ROOT / 'tools' / 'studies'], head=[], rows=[], notes=[], detection=[], profile={},
                  tasks=tasks)
    body = text[text.index('</style>'):]
    assert not re.search(r'<(script|b>|i>|u>)', body.replace('<b>&lt;b&gt;</b>', '').replace('<b>image</b>', ''))
    assert '&lt;script&gt;' in body


def test_the_key_of_a_chart_is_below_it():
    """Inside it would lie over a line; it makes the chart higher, by a row for three names."""
    curves = [(f'name {index}', OTHERS[index], [(0, index), (1, 1)]) for index in range(4)]
    heights = [float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', lines('t', curves[:count], 'x')).group(1))
               for count in (1, 2, 4)]
    assert heights[0] < heights[1] < heights[2]
    text = lines('t', curves, 'x')
    low = max(float(y) for y in re.findall(r'<path d="M [\d.]+ ([\d.]+)', text[text.index('id="line2d_'):])[:4])
    names = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>name \d<', text)] or [
        float(y) for y in re.findall(r'translate\([\d.]+ ([\d.]+)\)[^>]*>name \d<', text)]
    assert len(names) == 4 and min(names) > low
