"""Whose fault it is, and what nobody wrote: errors of the teacher's own config, classes left out, tokens as maps."""

import pytest
from mmengine.config import Config
from stock import detector, hook, teacher_of, tool, train

CWD = dict(loss_cwd=dict(type='CWDLoss', at='neck'))
COMMON = dict(loss_kd=dict(type='SigmoidKDLoss', at='@logits', classes='common'))


@pytest.fixture
def det(coco_root, tmp_path):
    return detector(coco_root, tmp_path / 'work')


SLIPS = [
    (dict(neck=dict(norm_confg=None)), "TypeError: .*norm_confg"),
    (dict(neck=dict(type='FPNN')), "KeyError: .*FPNN is not in"),
    (dict(neck=dict(num_outs=1)), 'AssertionError'),
    (dict(backbone=dict(depth=19)), 'KeyError: .*invalid depth 19'),
]


@pytest.mark.parametrize(('slip', 'message'), SLIPS, ids=[str(slip) for slip, _ in SLIPS])
@pytest.mark.parametrize('form', ['file', 'dict', 'peer', 'one of two'])
def test_a_slip_in_the_teachers_config(det, tmp_path, slip, message, form):
    """The word teacher and its name, whatever the model raises."""
    teacher = teacher_of(det, **slip)
    file = tmp_path / 'slipped.py'
    Config(teacher).dump(file)
    name, entry = dict(
        file=('slipped.py', hook(str(file), CWD)), dict=("of type 'RetinaNet'", hook(teacher, CWD)),
        peer=('slipped.py', hook(dict(type='PeerTeacher', config=str(file)), CWD)))[form] if form != 'one of two' else (
            'slipped.py', dict(type='kd_mm.DistillHook', losses=CWD, teachers=dict(
                good=dict(teacher=teacher_of(det), teacher_ckpt='random'),
                bad=dict(teacher=str(file), teacher_ckpt='random'))))
    start = r"teachers\['bad'\]: " if form == 'one of two' else ''
    with pytest.raises(ValueError, match=f'{start}teacher .*{name} cannot be built: {message}'):
        train(det, [entry])


def test_whose_relative_path_is_meant(det):
    with pytest.raises(ValueError, match=r"teacher config 'no/such.py' does not exist \(looked at /.*no/such.py "
                                         'and /.*/no/such.py; a relative path is taken from the current folder, then '
                                         'from that of the config'):
        train(det, [hook('no/such.py', CWD)])


def test_classes_that_are_left_out_are_listed(det, said, tmp_path, capsys):
    teacher = teacher_of(det, bbox_head=dict(num_classes=3))
    teacher['train_dataloader'] = dict(dataset=dict(type='CocoDataset', metainfo=dict(
        classes=('star', 'disc', 'bar'))))
    entry = hook(teacher, COMMON)
    train(det, [entry])
    lines = [line for line in said if 'left out' in line]
    assert lines == ['kd_mm: loss_kd: 1 classes are compared; of the student are left out: square',
                     'kd_mm: loss_kd: 1 classes are compared; of the teacher are left out: star, bar']
    det.custom_hooks = [entry]
    det.dump(tmp_path / 'config.py')
    assert tool('check_config').main([str(tmp_path / 'config.py'), '--shape', '64', '64']) == 0
    shown = capsys.readouterr().out
    assert 'of the student are left out: square' in shown and 'of the teacher are left out: star, bar' in shown


def test_tokens_taken_for_maps_are_told_once(det, said, tmp_path, capsys):
    swin = dict(_delete_=True, type='SwinTransformer', embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
                window_size=4)
    teacher = Config(teacher_of(det))
    teacher.merge_from_dict(dict(model=dict(backbone=swin, neck=dict(in_channels=[8, 16, 32, 64]))))
    losses = dict(loss_hint=dict(type='FitNetLoss', student_at='backbone.layer3',
                                 teacher_at='backbone.stages.2.blocks.0'))
    entry = hook(teacher.to_dict(), losses)
    train(det, [entry])
    lines = [line for line in said if 'tokens as maps' in line]
    assert len(lines) == 1 and "teacher 'backbone.stages.2.blocks.0': " in lines[0]
    det.custom_hooks = [entry]
    det.dump(tmp_path / 'config.py')
    assert tool('check_config').main([str(tmp_path / 'config.py'), '--shape', '64', '64']) == 0
    assert "tokens as maps: teacher 'backbone.stages.2.blocks.0'" in capsys.readouterr().out
