"""Semi-supervised detectors of the host: the student inside is distilled in both branches, or in one."""

import copy
from pathlib import Path

import pytest
import torch
from semi import soft_teacher
from stock import distill_hook, hook, make_runner, same, traces, train, weights

from kd_mm.engine.branches import Branches
from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.checkpoint import load_file
from kd_mm.hosts.models import build_model
from kd_mm.hosts.semi import inner_student
from kd_mm.lab.check import check

CWD = dict(loss_cwd=dict(type='CWDLoss', at='@neck', loss_weight=3.0))


@pytest.fixture
def semi(coco_root, tmp_path):
    return soft_teacher(coco_root, tmp_path / 'semi')


def teacher_of_semi(cfg, width=24):
    model = copy.deepcopy(cfg.model.detector.to_dict())
    model['neck']['out_channels'] = width
    model['rpn_head'].update(in_channels=width, feat_channels=width)
    model['roi_head']['bbox_roi_extractor']['out_channels'] = width
    model['roi_head']['bbox_head'].update(in_channels=width)
    return dict(model=model, default_scope='mmdet')


def with_mean_teacher(*hooks):
    return [dict(type='MeanTeacherHook'), *hooks]


def test_both_branches_are_distilled(semi):
    stock, stock_record = train(semi, with_mean_teacher())
    seen = []

    def look(runner):
        distiller = distill_hook(runner).distiller
        if not seen:
            original = distiller.current.teach

            def teach(inputs, samples):
                seen.append((inputs.shape[0], [sample.metainfo['img_id'] for sample in samples]))
                return original(inputs, samples)
            distiller.current.teach = teach
        return traces(runner.model)

    runner, record = train(semi, with_mean_teacher(hook(teacher_of_semi(semi), CWD)), look)
    first = record.losses[0]
    assert first['sup_loss_cwd'] > 0 and first['unsup_loss_cwd'] > 0 and 'loss_cwd' not in first
    assert first['sup_kd_weight_cwd'] == 3.0 and first['unsup_kd_task_ratio'] > 0
    # the host's own losses are what they were
    assert {key: first[key] for key in stock_record.losses[0] if key != 'loss'} == {
        key: value for key, value in stock_record.losses[0].items() if key != 'loss'}
    assert [count for count, _ in seen] == [2, 2]  # the second step, labelled and unlabelled images
    assert traces(runner.model) == traces(stock.model)
    assert not same(weights(runner), weights(stock))
    checkpoint = load_file(str(Path(semi.work_dir) / 'iter_2.pth'))
    assert list(checkpoint['state_dict']) == list(stock.model.state_dict())
    assert checkpoint['kd_mm']['state_dict']
    assert 'train/sup_kd_agree_cwd' in runner.message_hub.log_scalars


def test_weight_zero_equals_no_hook(semi):
    stock, stock_record = train(semi, with_mean_teacher())
    losses = dict(loss_cwd=dict(CWD['loss_cwd'], loss_weight=0))
    runner, record = train(semi, with_mean_teacher(hook(teacher_of_semi(semi), losses)))
    assert record.losses == stock_record.losses and same(weights(runner), weights(stock))


def test_one_branch_and_another_kind(coco_root, tmp_path):
    cfg = soft_teacher(coco_root, tmp_path / 'base', kind='SemiBaseDetector')
    losses = dict(CWD, loss_roi=dict(type='SoftmaxKDLoss', at='@roi_logits'))
    runner, record = train(cfg, with_mean_teacher(hook(teacher_of_semi(cfg), losses, branches=('sup', ))))
    assert record.losses[0]['sup_loss_cwd'] > 0 and record.losses[0]['sup_loss_roi'] > 0
    assert not any(key.startswith('unsup') and 'cwd' in key for key in record.losses[0])
    runner, record = train(cfg, with_mean_teacher(hook(teacher_of_semi(cfg), losses)))
    assert record.losses[0]['unsup_loss_roi'] > 0  # its unlabelled branch is the student's ordinary loss


def test_what_is_refused(semi):
    losses = dict(loss_roi=dict(type='SoftmaxKDLoss', at='@roi_logits'))
    with pytest.raises(ValueError, match='SoftTeacher computes the losses of unlabelled images from parts'):
        train(semi, with_mean_teacher(hook(teacher_of_semi(semi), losses)))
    auto = dict(loss_cwd=dict(CWD['loss_cwd'], loss_weight='auto'))
    with pytest.raises(ValueError, match="loss_weight='auto' measures one batch in a step"):
        train(semi, with_mean_teacher(hook(teacher_of_semi(semi), auto)))
    with pytest.raises(ValueError, match="branches='all' must be one of 'sup', 'unsup'"):
        make_runner(semi, with_mean_teacher(hook(teacher_of_semi(semi), CWD, branches='all')))
    with pytest.raises(ValueError, match='DistillVisHook takes pictures from the training data'):
        train(semi, with_mean_teacher(hook(teacher_of_semi(semi), CWD), dict(type='kd_mm.DistillVisHook')))
    other = copy.deepcopy(semi)
    other.model.detector.data_preprocessor.mean = [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match='the detector inside has another data_preprocessor'):
        train(other, with_mean_teacher(hook(teacher_of_semi(semi), CWD)))


def test_what_fits_one_branch_alone(semi):
    """Labelled images have the student's ordinary loss, and a step has one batch of them."""
    def faults(names, losses, **extra):
        distiller = Distiller(inner_student(model), teacher_of_semi(semi, 16), losses, teacher_ckpt='random',
                              scope='mmdet', **extra)
        return Branches(model, names).faults(distiller)

    model, both = build_model(semi, 'mmdet'), ('sup', 'unsup')
    rows = dict(loss_roi=dict(type='SoftmaxKDLoss', at='@roi_logits'))
    assert faults(['sup'], rows) == []
    for names in (both, ['unsup']):
        fault, = faults(names, rows)
        assert 'SoftTeacher computes the losses of unlabelled images from parts' in fault
    auto = dict(loss_cwd=dict(CWD['loss_cwd'], loss_weight='auto'))
    assert faults(['sup'], auto) == faults(['unsup'], auto) == []
    assert 'measures one batch in a step, and there are two' in faults(both, auto)[0]
    against = dict(loss_h=dict(type='SKDHolisticLoss', at='@neck', levels=[0], width=2))
    assert faults(['unsup'], against) == []
    assert 'trains a network against the student once a step, and there are two batches' in faults(both, against)[0]
    labels = dict(labels=dict(type='PseudoLabels', classes='positional'))
    assert faults(['sup'], None, **labels) == []
    assert faults(['unsup'], None, **labels) == ["labels are added to labelled images: branches must have 'sup'"]


def test_labels_are_added_to_labelled_images(semi):
    labels = dict(type='PseudoLabels', score=0.0, iou=1.0, classes='positional')
    teacher = teacher_of_semi(semi)
    counts, found = [], []

    def look(runner):
        if not counts:
            project = runner.model.project_pseudo_instances

            def projected(*args):
                samples = project(*args)
                found.append([len(sample.gt_instances) for sample in samples])
                return samples
            runner.model.project_pseudo_instances = projected
            for name in ('loss_by_gt_instances', 'loss_by_pseudo_instances'):
                original = getattr(runner.model, name)

                def method(inputs, samples, *args, original=original, name=name):
                    counts.append((name, [len(sample.gt_instances) for sample in samples]))
                    return original(inputs, samples, *args)
                vars(runner.model)[name] = method

    _, plain_record = train(semi, with_mean_teacher())
    runner, record = train(semi, with_mean_teacher(hook(teacher, None, labels=labels)), look)
    assert runner.message_hub.log_scalars['train/kd_labels_boxes'].current() > 0
    (first, labelled), (second, pseudo) = counts[:2]
    assert (first, second) == ('loss_by_gt_instances', 'loss_by_pseudo_instances')
    assert all(count > 10 for count in labelled)
    assert pseudo == found[0]  # what the host's mean teacher has found, and nothing else
    assert record.losses[0]['sup_loss_bbox'] != plain_record.losses[0]['sup_loss_bbox']


def test_the_check_knows_them(semi):
    semi.custom_hooks = with_mean_teacher(hook(teacher_of_semi(semi), CWD))
    report = check(semi, (128, 128))
    assert not report.problems and report.step.terms[0].loss > 0
    semi.custom_hooks[1]['branches'] = 'neither'
    assert "branches='neither' must be one of" in check(semi, (128, 128)).problems[0]
    assert torch.isfinite(torch.tensor(report.step.total))
