"""What the log of a real training says about the terms."""

import json
from pathlib import Path

import pytest
import torch
from stock import detector, hook, same, segmentor, teacher_of, train, weights

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.hook import DistillHook
from kd_mm.engine.likeness import Likeness
from kd_mm.engine.preflight import random_data
from kd_mm.hosts.models import build_model, load_config

PARTS = ('fg', 'bg', 'mask', 'rela')


@pytest.fixture
def det(coco_root, tmp_path):
    return detector(coco_root, tmp_path / 'work')


@pytest.fixture
def seg(cityscapes_root, tmp_path):
    return segmentor(cityscapes_root, tmp_path / 'work')


def test_the_parts_of_a_term_are_logged_and_counted_once(det):
    """FGD: `loss_fgd` is the sum of its four parts, and the host's total holds it once."""
    losses = dict(loss_fgd=dict(type='FGDLoss', at='neck', loss_weight=2.0), loss_pkd=dict(type='PKDLoss', at='neck'))
    runner, record = train(det, [hook(teacher_of(det), losses)])
    step = record.losses[-1]
    parts = {part: float(runner.message_hub.get_scalar(f'train/loss_fgd/{part}').current()) for part in PARTS}
    assert all(value > 0 for name, value in parts.items())
    assert sum(parts.values()) == pytest.approx(step['loss_fgd'], rel=1e-5)
    terms = [value for name, value in step.items() if name.startswith('loss_')]
    assert len(terms) == 4 and step['loss'] == pytest.approx(sum(terms), rel=1e-5)
    assert not [name for name in step if '/' in name]  # what the host sums
    assert not [name for name in runner.message_hub.log_scalars if name.startswith('train/loss_pkd/')]

    line = next(Path(det.work_dir).glob('*/vis_data/scalars.json')).read_text().splitlines()[-1]
    written = json.loads(line)
    assert sum(written[f'loss_fgd/{part}'] for part in PARTS) == pytest.approx(written['loss_fgd'], rel=1e-4)


def test_a_factor_of_a_part_moves_that_part_alone(det):
    found = []
    for gamma in (5e-4, 1e-3):
        runner, _ = train(det, [hook(teacher_of(det), dict(loss_fgd=dict(type='FGDLoss', at='neck', gamma=gamma)))])
        found.append({part: float(runner.message_hub.get_scalar(f'train/loss_fgd/{part}').data[0][0])
                      for part in PARTS})
    first, second = found
    assert second['mask'] == pytest.approx(2 * first['mask'], rel=1e-5)
    assert all(second[part] == pytest.approx(first[part], rel=1e-5) for part in PARTS if part != 'mask')


def test_the_log_has_each_part_once_an_iteration_and_none_without_the_term(det):
    """As the host logs its own losses; of a term whose time is over, nothing is logged again."""
    det.train_cfg.max_iters = 4
    window = dict(type='WindowSchedule', windows=[(0, 2)])
    losses = dict(loss_all=dict(type='FGDLoss', at='neck'),
                  loss_some=dict(type='FGDLoss', at='neck', loss_weight=window))
    runner, record = train(det, [hook(teacher_of(det), losses)])
    assert [('loss_all' in step, 'loss_some' in step) for step in record.losses] == [(True, step < 2)
                                                                                    for step in range(4)]
    for name, times in (('loss_all', 4), ('loss_some', 2)):
        for part in PARTS:
            values, counts = runner.message_hub.get_scalar(f'train/{name}/{part}').data
            assert len(values) == times and counts.tolist() == [1] * times, (name, part)


def test_what_is_logged_holds_no_graph(det):
    student = build_model(load_config(det.to_dict())[0], det.default_scope)
    student.init_weights()
    kd = Distiller(student, teacher_of(det), dict(loss_fgd=dict(type='FGDLoss', at='neck')), teacher_ckpt='random',
                   scope='mmdet')
    student.train()
    kd.attach()
    student(**random_data(student, (64, 64)), mode='loss')
    found = kd.after_step()
    assert sorted(found) == sorted(f'loss_fgd/{part}' for part in PARTS)
    assert all(value.shape == () and not value.requires_grad for value in found.values())
    assert not kd.after_step()  # told once
    kd.detach()


def test_agreement_reaches_every_backend_of_the_visualizer_and_changes_nothing(det):
    """Also of the log; weights, losses and the random numbers after the training are those without it."""
    det.train_cfg.max_iters = 3
    losses = dict(loss_fgd=dict(type='FGDLoss', at='neck'),
                  loss_logit=dict(type='SigmoidKDLoss', at='bbox_head.retina_cls'))
    found = []
    for every in (2, 0):
        det.work_dir = str(Path(det.work_dir).with_name(f'agree_{every}'))
        runner, record = train(det, [hook(teacher_of(det), losses, agreement=every)])
        found.append((runner, record, torch.get_rng_state()))
    (runner, record, state), (plain, plain_record, plain_state) = found
    assert same(weights(runner), weights(plain)) and torch.equal(state, plain_state)
    assert record.losses == plain_record.losses
    for name in ('kd_agree_fgd', 'kd_agree_logit'):
        values, counts = runner.message_hub.get_scalar(f'train/{name}').data
        assert len(values) == 3 and counts.tolist() == [1, 1, 1]  # a training as short as this in every iteration
        assert all(-1 <= value <= 1 for value in values) and f'train/{name}' not in plain.message_hub.log_scalars
    file = next(Path(runner.work_dir).glob('*/vis_data/scalars.json'))
    line = json.loads(file.read_text().splitlines()[-1])
    for name in ('loss_fgd/fg', 'kd_weight_fgd', 'kd_task_ratio', 'kd_agree_fgd', 'kd_agree_logit'):
        assert isinstance(line[name], float), name


def test_agreement_of_a_short_training_does_not_stay_at_its_first_value(det):
    """By the default of the hook, which is longer than the whole training: the log of its end is of its end."""
    det.train_cfg.max_iters = 12
    runner, _ = train(det, [hook(teacher_of(det), dict(loss_fgd=dict(type='FGDLoss', at='neck')))])
    values, _ = runner.message_hub.get_scalar('train/kd_agree_fgd').data
    assert len(values) == 12 and len(set(values.tolist())) > 6
    lines = next(Path(det.work_dir).glob('*/vis_data/scalars.json')).read_text().splitlines()
    last = json.loads(lines[-1])['kd_agree_fgd']
    assert last == pytest.approx(values[-1], abs=1e-4) and last != pytest.approx(values[0], abs=1e-4)


def test_agreement_is_measured_at_its_interval_in_a_long_training():
    likeness = Likeness(50)
    assert [step for step in range(1003) if likeness.due(step, 1003)] == [0, *range(49, 1000, 50), 1002]
    assert [step for step in range(120) if likeness.due(step)] == [0, 49, 99]  # of unknown length
    assert not any(Likeness(0).due(step, 20) for step in range(20))


def test_a_copy_of_the_teacher_agrees_with_it(seg):
    """By features, by class logits of pixels, and where levels differ in width only the features."""
    losses = dict(loss_logits=dict(type='CWDLoss', at='decode_head.conv_seg'),
                  loss_features=dict(type='PKDLoss', at='backbone', levels=[2, 3]))
    numbers = []
    for teacher in (dict(teacher='student'), dict(teacher=teacher_of(seg))):
        student = build_model(load_config(seg.to_dict())[0], seg.default_scope)
        student.init_weights()
        kd = Distiller(student, losses=losses, scope='mmseg', agreement=1, **dict(teacher, teacher_ckpt='random'))
        if teacher['teacher'] == 'student':
            kd.teacher.model.load_state_dict(student.state_dict())
        student.train()
        for module in student.modules():
            if isinstance(module, (torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.dropout._DropoutNd)):
                module.eval()
        kd.attach()
        student(**random_data(student, (64, 64)), mode='loss')
        numbers.append({name: float(value) for name, value in kd.after_step().items() if 'agree' in name})
        kd.detach()
    assert numbers[0] == pytest.approx(dict(kd_agree_logits=1.0, kd_agree_features=1.0), abs=1e-4)
    assert numbers[1]['kd_agree_logits'] < 0.9 and numbers[1]['kd_agree_features'] < 0.9


@pytest.mark.parametrize('value', [-1, 1.5, 'often', True])
def test_a_wrong_interval_is_refused(value):
    with pytest.raises(ValueError, match='agreement='):
        DistillHook(teacher='self', losses={}, agreement=value)
