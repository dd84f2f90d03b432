"""Which classes of two models are the same."""

import pytest
import torch

from kd_mm.ops.classes import (
    SYNONYMS,
    by_number,
    check_classes,
    common_classes,
    find_class,
    lookup,
    map_classes,
    spelling,
    take_classes,
    united,
)

COCO = ('person', 'bicycle', 'car', 'motorcycle', 'airplane', 'bus', 'train', 'boat', 'bird', 'cat', 'dog', 'horse',
        'sheep', 'cow', 'bottle', 'chair', 'couch', 'potted plant', 'dining table', 'tv')
VOC = ('aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
       'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor')


def test_the_hosts_own_names_of_coco_and_voc():
    from mmdet.datasets import CocoDataset, VOCDataset
    coco, voc = CocoDataset.METAINFO['classes'], VOCDataset.METAINFO['classes']
    own, theirs = common_classes(voc, coco)
    assert own == list(range(20)) and len(set(theirs)) == 20
    assert {voc[i]: coco[t] for i, t in zip(own, theirs) if voc[i] != coco[t]} == dict(
        aeroplane='airplane', diningtable='dining table', motorbike='motorcycle', pottedplant='potted plant',
        sofa='couch', tvmonitor='tv')
    assert len(common_classes(coco, voc)[0]) == 20
    assert len({spelling(name) for name in coco}) == 80


def test_spelling():
    assert all(spelling(name) == spelling(other) for name, others in SYNONYMS.items() for other in others)
    assert find_class('Potted_Plant', COCO) == 17 and find_class('potted plant', VOC) == 15
    assert find_class('tv', ['tvmonitor', 'tv']) == 1  # the name itself comes first
    assert find_class('sofa', ['couch', 'Couch']) is None  # which one is not known
    assert common_classes(['tv', 'tvmonitor'], ['tvmonitor']) == ([1], [0])
    with pytest.raises(ValueError, match='no class name in common'):  # it would teach two
        common_classes(['sofa', 'couch'], ['Couch'])


def test_forms():
    assert map_classes('common', VOC, COCO)[0] == (20, list(range(20)))
    assert map_classes(['sofa', 'car'], VOC, COCO) == ((20, [17, 6]), (20, [16, 2]))
    assert map_classes('positional', None, COCO, (3, None)) == ((3, [0, 1, 2]), (20, [0, 1, 2]))
    pair = map_classes(dict(car='vehicle', bus='vehicle', person='person'), ['person', 'vehicle'], COCO)
    assert pair == ((2, [0, 1]), (20, [0, (2, 5)]))
    assert lookup(pair).tolist() == [0, -1, 1, -1, -1, 1] + [-1] * 14
    assert map_classes({'sofa': 'couch', 3: 0}, COCO, VOC) == ((20, [0, 16]), (20, [3, 17]))
    assert map_classes({7: 1}, None, None, (2, None)) == ((2, [1]), (8, [7]))
    assert by_number({1: 2}) and not by_number({'a': 2}) and not by_number(['a'])


@pytest.mark.parametrize('value', ['all', 3, [], {}, [1], {'a': 1.5}, {'a': -1}, {'a': True}, {None: 'a'}])
def test_forms_that_are_none(value):
    with pytest.raises(ValueError, match='loss_kd: classes=.* must be'):
        check_classes('loss_kd', value)


@pytest.mark.parametrize('classes, message', [
    (dict(cat='sofa'), 'the student does not know .sofa.; it has person, disc'),
    (dict(person='cat'), 'the student does not know .cat.; it has person, disc.*turned round'),
    ({'cat': 'person', 0: 'disc'}, 'names class 0 of the teacher twice'),
    ({5: 'disc'}, 'the teacher does not know 5'),
    ('common', 'no class name in common'),
    (['cat'], 'the student does not know cat')])
def test_maps_that_do_not_fit(classes, message):
    with pytest.raises(ValueError, match=message):
        map_classes(classes, ['person', 'disc'], ['cat', 'dog'])


def test_names_that_are_not_known():
    with pytest.raises(ValueError, match="of the teacher, and its class names are not known. Give 'positional'"):
        map_classes('common', ['a'], None, (1, 4))
    with pytest.raises(ValueError, match='of the student, and they are not known'):
        map_classes('positional', None, ['a'])


def test_logits_of_several_classes_are_one():
    """By hand: a softmax over {a, b or c} has the probabilities of a softmax over all three, added."""
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    taken = take_classes(logits, 3, [0, (1, 2)])
    shares = logits.softmax(1)
    torch.testing.assert_close(taken.softmax(1), torch.stack([shares[:, 0], shares[:, 1] + shares[:, 2]], 1))
    two = torch.cat([logits, logits + 1], 1)  # two anchors
    assert torch.equal(take_classes(two, 3, [0, (1, 2)])[:, :2], taken)
    rows = torch.randn(5, 4)
    assert torch.equal(take_classes(rows, 3, [(0, 2)])[:, 1], rows[:, 3])  # the background stays
    assert take_classes(logits, 3, [1, ()])[:, 1].isnan().all()


def test_united():
    pairs = united([((4, [0, 2]), (9, [5, 6])), ((4, [2, 3]), (2, [0, (1, )]))])
    assert pairs == [((4, [0, 2, 3]), (9, [5, 6, ()])), ((4, [0, 2, 3]), (2, [(), 0, (1, )]))]
