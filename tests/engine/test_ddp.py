"""Two real processes over gloo against one process on the joined batch."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import write_coco
from ranks import run

WORKER = Path(__file__).resolve().parents[1] / 'helpers' / 'ddp_worker.py'


def launch(root, out, batch, counts, ranks):
    return run([str(WORKER), str(root), str(out), str(batch), str(counts), 'pytorch' if ranks > 1 else 'none'], out,
               ranks)


def keep_objects_of_even_images(root):
    """With two ranks, every image with objects goes to the first."""
    content = json.loads((root / 'annotations.json').read_text())
    content['annotations'] = [box for box in content['annotations'] if box['image_id'] % 2 == 0]
    (root / 'annotations.json').write_text(json.dumps(content))


@pytest.fixture(scope='module')
def joined(cityscapes_root, tmp_path_factory):
    return launch(cityscapes_root, tmp_path_factory.mktemp('one') / 'joined', 4, 1, 1)[0]


@pytest.mark.parametrize('batch, counts', [(2, 1), (1, 2)], ids=['one step', 'accumulated with no_sync'])
def test_two_processes_equal_one_on_the_joined_batch(cityscapes_root, tmp_path, joined, batch, counts):
    first, second = launch(cityscapes_root, tmp_path / 'two', batch, counts, 2)
    assert first['alike'] == second['alike'] and list(first['alike']) == ['train/kd_agree_kd', 'train/kd_agree_hint']
    assert joined['pictures'] == 2 and second['pictures'] in (1, 2)  # one rank writes, before and after the update
    for part in ('student', 'extras'):
        assert first[part].keys() == joined[part].keys()
        for key, value in joined[part].items():
            torch.testing.assert_close(first[part][key], second[part][key], rtol=0, atol=0, msg=f'ranks: {key}')
            torch.testing.assert_close(first[part][key], value, rtol=1e-4, atol=1e-6, msg=f'joined: {key}')


def test_uneven_batches_and_a_rank_without_boxes(tmp_path):
    root = write_coco(tmp_path / 'coco', images=7, empty=0)
    keep_objects_of_even_images(root)
    first, second = run([str(WORKER.with_name('ddp_boxes_worker.py')), str(root), str(tmp_path / 'two')],
                        tmp_path / 'two', 2)
    assert [len(step) for step in first['boxes']] == [2, 2] and [len(step) for step in second['boxes']] == [2, 1]
    assert all(count > 0 for step in first['boxes'] for count in step)
    assert all(count == 0 for step in second['boxes'] for count in step)
    for rank in (first, second):
        assert all(math.isfinite(value) for step in rank['losses'] for value in step.values())
    assert all(step['loss_fg'] == 0 for step in second['losses']) and first['losses'][0]['loss_fg'] > 0
    for part in ('student', 'extras'):
        for key, value in first[part].items():
            if 'running_' not in key and 'num_batches' not in key:  # batch norm's statistics are each rank's own
                torch.testing.assert_close(second[part][key], value, rtol=0, atol=0, msg=key)


def test_shared_proposals_and_a_rank_without_objects(tmp_path):
    """A rank without positive proposals has masks and boxes of 0 rows, and waits for nothing."""
    root = write_coco(tmp_path / 'coco', images=8, empty=0)
    keep_objects_of_even_images(root)
    first, second = run([str(WORKER.with_name('ddp_proposals_worker.py')), str(root), str(tmp_path / 'two')],
                        tmp_path / 'two', 2)
    names = ('loss_dkd', 'loss_bound', 'loss_masks', 'loss_hint')
    for step in (*first['losses'], *second['losses']):
        assert all(math.isfinite(value) for value in step.values())
    assert all(step[name] > 0 for step in first['losses'] for name in names)
    assert all(step['loss_masks'] == step['loss_bound'] == 0 and step['loss_dkd'] > 0 for step in second['losses'])
    for part in ('student', 'extras'):
        for key, value in first[part].items():
            if 'running_' not in key and 'num_batches' not in key:
                torch.testing.assert_close(second[part][key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize('kind, message', [
    ('peer', 'is not finite at step 1 (on rank 1)'),
    ('fixed', 'distillation loss is not finite at step 1: loss_kd, level 0 (on rank 1). Lower')])
def test_what_breaks_on_one_rank_stops_all(cityscapes_root, tmp_path, kind, message):
    """A rank that went on would wait for the gradients of the other."""
    ranks = run([str(WORKER.with_name('ddp_peer_worker.py')), str(cityscapes_root), str(tmp_path / 'two'), kind],
                tmp_path / 'two', 2)
    for rank in ranks:
        assert rank['iter'] == 1 and message in rank['message'], ranks


def launch_teachers(root, out, kind, batch, counts, ranks):
    return run([str(WORKER.with_name('ddp_teachers_worker.py')), str(root), str(out), kind, str(batch), str(counts),
                'pytorch' if ranks > 1 else 'none'], out, ranks)


@pytest.fixture(scope='module')
def joined_teachers(cityscapes_root, tmp_path_factory):
    """What one process makes of the joined batches, computed once a kind of teacher."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = launch_teachers(cityscapes_root, tmp_path_factory.mktemp(kind) / 'joined', kind, 4, 1, 1)[0]
        return made[kind]

    return of


@pytest.mark.parametrize('kind, batch, counts', [('peer', 2, 1), ('peer', 1, 2), ('ema', 2, 1)],
                         ids=['peer', 'peer, accumulated', 'mean teacher'])
def test_teachers_that_change_equal_one_process_on_the_joined_batch(
        cityscapes_root, tmp_path, joined_teachers, kind, batch, counts):
    whole = joined_teachers(kind)
    first, second = launch_teachers(cityscapes_root, tmp_path / 'two', kind, batch, counts, 2)
    parts = ['student', 'teacher', 'extras', 'optimizers', *(['mirrors'] if kind == 'peer' else [])]
    for part in parts:
        assert first[part].keys() == second[part].keys() == whole[part].keys() and whole[part], part
        for key, value in whole[part].items():
            torch.testing.assert_close(first[part][key], second[part][key], rtol=0, atol=0,
                                       msg=lambda text, at=f'{part} {key}': f'ranks: {at}: {text}')
            torch.testing.assert_close(first[part][key], value, rtol=1e-4, atol=1e-5,
                                       msg=lambda text, at=f'{part} {key}': f'joined: {at}: {text}')
    assert kind == 'ema' or any(key.startswith('1.') for key in whole['optimizers'])  # the peer has been updated
    assert len(first['losses']) == len(second['losses']) == 5 * counts
    for step in (*first['losses'], *second['losses']):
        assert step['loss_hint'] > 0
        assert kind == 'ema' or step['peer_total'] > step['peer_task'] > 0
    assert first['losses'][0]['loss_kd'] != second['losses'][0]['loss_kd'] or kind == 'ema'  # other pictures


def test_labels_from_a_teacher_on_two_ranks(tmp_path):
    """Gradients are accumulated over two iterations; a rank without objects of its own gets those of the teacher."""
    root = write_coco(tmp_path / 'coco', images=8, empty=0)
    keep_objects_of_even_images(root)
    first, second = run([str(WORKER.with_name('ddp_labels_worker.py')), str(root), str(tmp_path / 'two')],
                        tmp_path / 'two', 2)
    for rank in (first, second):
        assert all(count > 2 for step in rank['boxes'] for count in step)
        assert all(math.isfinite(value) for step in rank['losses'] for value in step.values())
    for key, value in first['student'].items():
        if 'running_' not in key and 'num_batches' not in key:
            torch.testing.assert_close(second['student'][key], value, rtol=0, atol=0, msg=key)
