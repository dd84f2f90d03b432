"""tools/check_config.py: what it prints for a good config, and that it names all that is wrong with a bad one."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_coco
from mmengine.config import Config
from stock import NARROW_FCN, coco_data, detector, hook, teacher_of

from kd_mm.hosts.zoo import zoo_config
from kd_mm.lab import check as inspection
from kd_mm.lab.configs import dropped_hooks, faults, lost_weights, read_config
from kd_mm.lab.curves import curves_of
from kd_mm.lab.models import hint_of

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
SPEC = importlib.util.spec_from_file_location('kd_mm_tool_check_config', TOOLS / 'check_config.py')
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)

# By path: for a name with `::` mmengine reads every metafile of the host first.
DETECTOR = f'''
_base_ = {str(zoo_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'))!r}
model = dict(
    backbone=dict(base_channels=8, stem_channels=8, frozen_stages=-1, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1))
'''
TEACHER = '''
_base_ = './student.py'
model = dict(
    data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    neck=dict(out_channels=24), bbox_head=dict(in_channels=24, feat_channels=24))
'''
SHAPE = ['--shape', '64', '64']


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'student.py').write_text(DETECTOR)
    (tmp_path / 'teacher.py').write_text(TEACHER)
    (tmp_path / 'segmentor.py').write_text(NARROW_FCN)
    return tmp_path


def write(folder, hooks, base='student.py', extra='', name='config.py'):
    path = folder / name
    path.write_text(f"_base_ = './{base}'\nteacher = '{{{{ fileDirname }}}}/teacher.py'\n"
                    f'custom_hooks = [{hooks}]\n{extra}\n')
    return str(path)


def distil(losses, teacher='teacher', **more):
    arguments = ', '.join(f'{key}={value!r}' for key, value in {'teacher_ckpt': 'random', **more}.items())
    return f"dict(type='kd_mm.DistillHook', teacher={teacher}, losses={losses!r}, {arguments})"


def test_a_good_config_prints_every_term(folder, capsys):
    config = write(folder, distil({
        'loss_cwd': {'type': 'CWDLoss', 'at': 'neck', 'loss_weight': [1.0, 2.0, 3.0, 0.0, 0.5]},
        'loss_hint': {'type': 'FitNetLoss', 'at': 'backbone.layer4'},
    }, inherit=('backbone', )))
    assert TOOL.main([config, *SHAPE]) == 0
    text = capsys.readouterr().out
    assert 'teacher.py: RetinaNet' in text and 'weights: random' in text and 're-normalised' in text
    assert 'inherit     backbone' in text
    cwd, hint = text.split('loss_cwd: CWDLoss')[1].split('loss_hint: FitNetLoss')
    assert 'ConvAdapter (automatic)' in cwd and 'none needed' in hint
    assert [line.split()[1:4] for line in cwd.splitlines() if line.split()[:1] and line.split()[0] in '01234'] == [
        ['2x16x8x8', '2x24x8x8', '1'], ['2x16x4x4', '2x24x4x4', '2'], ['2x16x2x2', '2x24x2x2', '3'],
        ['2x16x1x1', '2x24x1x1', '0'], ['2x16x1x1', '2x24x1x1', '0.5']]
    assert '2x64x2x2' in hint
    assert text.endswith(f'\nok\nNext: kd-mm train {config}\n') and 'WARNING' not in text


def test_a_hook_that_is_no_list(folder):
    """It would be taken for no distillation, and the Runner raises its own error."""
    cfg = read_config(write(folder, distil({'loss_cwd': {'type': 'CWDLoss', 'at': 'neck'}})))
    cfg.custom_hooks = cfg.custom_hooks[0]
    said = ['custom_hooks is one entry, and the Runner takes a list: custom_hooks = [dict(...)]']
    assert faults(cfg) == said and inspection.check(cfg, (64, 64)).problems == said


def test_a_term_that_drowns_the_task(folder, capsys):
    """Its share is printed and 'auto' offered. No warning: a random student says little of a trained one."""
    losses = {'loss_hint': {'type': 'FitNetLoss', 'at': 'neck', 'loss_weight': 1e6}}
    assert TOOL.main([write(folder, distil(losses)), *SHAPE]) == 0
    text = capsys.readouterr().out
    share = float(text.split('  share')[1].split()[0])
    assert share > 45 and "with this random student; loss_weight='auto' holds it at 1" in text
    losses['loss_hint']['loss_weight'] = {'type': 'AutoWeight', 'share': 0.5}
    assert TOOL.main([write(folder, distil(losses)), *SHAPE]) == 0
    text = capsys.readouterr().out
    assert "0.5 of the task's gradient at its taps, held there by loss_weight='auto'" in text
    assert 'WARNING' not in text


def test_the_numbers_of_the_dry_step(folder):
    """Terms and task losses add up to the total, each term has a gradient, and nothing is left on the models."""
    config = write(folder, distil({'loss_cwd': {'type': 'CWDLoss', 'at': 'neck'},
                                   'loss_kd': {'type': 'SigmoidKDLoss', 'at': 'bbox_head.retina_cls'}}))
    report = inspection.check(read_config(config), (64, 64))
    assert report.problems == []
    terms = {term.name: term for term in report.step.terms}
    total = sum(report.step.task.values()) + sum(term.loss for term in terms.values())
    assert report.step.total == pytest.approx(total, rel=1e-5)
    for term in terms.values():
        assert term.gradient > 0
        assert term.loss == pytest.approx(sum(level.loss for level in term.levels), rel=1e-5)
    assert terms['loss_cwd'].extras_gradient > 0 and terms['loss_kd'].extras == 0
    assert not report.student._forward_hooks
    assert all(parameter.grad is None for parameter in report.student.parameters())
    assert not any('per_level' in vars(term) for term in report.distiller.terms.values())


def test_a_segmentor_is_checked_at_the_given_size(folder, capsys):
    config = write(folder, distil({'loss_kd': {'type': 'SoftmaxKDLoss', 'at': 'decode_head.conv_seg'}},
                                  teacher='"{{ fileDirname }}/segmentor.py"'), base='segmentor.py')
    assert TOOL.main([config, '--shape', '64', '96']) == 0
    text = capsys.readouterr().out
    assert '64x96' in text and '2x19x8x12' in text and 'decode.loss_ce' in text


def test_all_problems_are_listed_together(folder, capsys):
    config = write(folder, distil({
        'loss_a': {'type': 'CWDLos', 'at': 'neck'},
        'loss_b': {'type': 'PKDLoss', 'at': 'neckk'},
        'cwd': {'type': 'CWDLoss', 'at': 'neck'},
    }, teacher='"nowhere.py"', colour='red'))
    assert TOOL.main([config, *SHAPE]) == 1
    text = capsys.readouterr().out
    assert '5 problem(s)' in text
    for part in ("unknown argument(s) 'colour'", "unknown loss type 'CWDLos'", "no module 'neckk'",
                 "'cwd': a loss name must start with", "'nowhere.py' does not exist"):
        assert part in text
    assert 'ok' not in text.splitlines()


def test_runner_settings_that_are_not_supported(folder):
    entry = distil({'loss_cwd': {'type': 'CWDLoss', 'at': 'neck'}})
    part = "dict(optimizer=dict(type='SGD', lr=0.1))"
    config = write(folder, f'{entry}, {entry}', extra=(
                   f"runner_type = 'FlexibleRunner'\nstrategy = dict(type='FSDPStrategy')\n"
                   f"optim_wrapper = dict(_delete_=True, constructor='Two', a={part}, b={part})"))
    problems = inspection.check(read_config(config), (64, 64)).problems
    assert len(problems) == 3
    for word in ('2 times', 'FSDPStrategy', 'OptimWrapperDict'):
        assert any(word in problem for problem in problems)


def test_a_step_that_fails_is_a_problem(folder):
    config = write(folder, distil({'loss_bbox': {'type': 'CWDLoss', 'at': 'neck'}}))
    problems = inspection.check(read_config(config), (64, 64)).problems
    assert len(problems) == 1 and "already has a loss named 'loss_bbox'" in problems[0]


def test_a_batch_that_is_too_small_says_so():
    assert 'larger --batch' in hint_of(ValueError('Expected more than 1 value per channel when training, got ...'))
    assert '--shape H W' in hint_of(ValueError('sizes of tensors must match'))


def test_no_distillation_hook(folder, capsys):
    assert TOOL.main([str(folder / 'student.py')]) == 1
    assert 'custom_hooks has no kd_mm.DistillHook' in capsys.readouterr().out
    assert TOOL.main([str(folder / 'missing.py')]) == 1
    assert 'no such config' in capsys.readouterr().err


def test_weights_to_start_from_that_are_not_there(folder):
    """Of the student: the training would stop at them after everything was built."""
    config = read_config(write(folder, distil({'loss_cwd': {'type': 'CWDLoss', 'at': 'neck'}}), extra=(
        "load_from = 'lost.pth'\n"
        "model = dict(backbone=dict(init_cfg=dict(_delete_=True, type='Pretrained', checkpoint='gone/resnet.pth')))")))
    problems = inspection.check(config, (64, 64)).problems
    assert problems[0].startswith("load_from='lost.pth': no such file (looked at /")
    assert problems[0].endswith('or load_from=None to start without them')
    assert problems[1].startswith("model.backbone.init_cfg.checkpoint='gone/resnet.pth': no such file")
    assert problems[1].endswith('or model.backbone.init_cfg=None to start without them')
    config.model.pretrained, config.load_from = 'gone/resnet.pth', None  # one file at two places is one problem
    problem, = lost_weights(config)
    assert problem.startswith("model.backbone.init_cfg.checkpoint and model.pretrained='gone/resnet.pth': no such file")
    assert problem.endswith('or model.backbone.init_cfg=None and model.pretrained=None to start without them')
    config.model.pop('pretrained')
    (folder / 'there.pth').write_text('')
    config.load_from, config.model.backbone.init_cfg = str(folder / 'there.pth'), dict(
        type='Pretrained', checkpoint='torchvision://resnet18')
    assert not lost_weights(config)


def test_a_plain_config_with_its_data(folder, capsys):
    """Data are looked at before there is a distillation; without --data there would be nothing to look at."""
    extra = Config(coco_data(write_coco(folder / 'coco', size=(64, 64)))).pretty_text
    (folder / 'plain.py').write_text(f"_base_ = './student.py'\n{extra}")
    assert TOOL.main([str(folder / 'plain.py'), '--data', '2']) == 0
    text = capsys.readouterr().out
    assert 'samples of train_dataloader.dataset' in text and 'Only the model and the data were looked at' in text
    assert text.endswith('\nok\n')
    (folder / 'plain.py').write_text(f"_base_ = './student.py'\n{extra}\nmodel = dict(bbox_head=dict(num_classes=1))")
    assert TOOL.main([str(folder / 'plain.py'), '--data', '8']) == 1
    assert 'beyond the 1 classes of the student' in capsys.readouterr().out


def test_a_weight_that_starts_at_zero_is_tried_where_it_is_not(folder, capsys):
    window = {'levels': 1.0, 'schedule': {'type': 'WindowSchedule', 'windows': [(1000, None)]}}
    config = write(folder, distil({'loss_cwd': {'type': 'CWDLoss', 'at': 'neck', 'loss_weight': window}}))
    assert TOOL.main([config, *SHAPE]) == 0
    text = capsys.readouterr().out
    assert 'as step 1000 of' in text and 'not all terms have a weight at step 0' in text
    config = write(folder, distil({'loss_cwd': {'type': 'CWDLoss', 'at': 'neck', 'loss_weight': 0}}), name='zero.py')
    assert TOOL.main([config, *SHAPE]) == 0
    assert 'has the weight 0' in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- dropped hooks


def lost(path):
    return dropped_hooks(Config.fromfile(str(path)))


def test_dropped_hooks_of_a_stock_base(tmp_path):
    base = zoo_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
    head = f'_base_ = {str(base)!r}\n'
    entry = "dict(type='kd_mm.DistillHook', teacher='x', losses=dict())"
    (tmp_path / 'loses.py').write_text(f"_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'\n"
                                       f'custom_hooks = [{entry}]')
    # A child of the child loses them as well, and the file that dropped them is named.
    (tmp_path / 'child.py').write_text("_base_ = './loses.py'\n")
    for name in ('loses.py', 'child.py'):
        sentence, = lost(tmp_path / name)
        assert sentence.startswith('custom_hooks of ') and 'loses.py replaces' in sentence
        assert 'EMAHook, PipelineSwitchHook' in sentence and 'mmdet::rtmdet/rtmdet_tiny' in sentence
    keeps = "dict(type='mmdet.EMAHook'), dict(type='PipelineSwitchHook')"
    (tmp_path / 'keeps.py').write_text(f'{head}custom_hooks = [{entry}, {keeps}]')
    assert lost(tmp_path / 'keeps.py') == []
    # What a host's own config leaves out, it leaves out on purpose.
    assert lost(base) == []


def test_dropped_hooks_are_a_warning_on_the_command_line(folder, capsys):
    (folder / 'base.py').write_text("_base_ = './student.py'\ncustom_hooks = [dict(type='EMAHook')]")
    config = write(folder, distil({'loss_cwd': {'type': 'CWDLoss', 'at': 'neck'}}), base='base.py')
    assert TOOL.main([config, *SHAPE]) == 0
    text = capsys.readouterr().out
    assert 'WARNING: custom_hooks of' in text and 'drops EMAHook' in text


# ---------------------------------------------------------------------------------------------------- no download


def test_a_url_is_not_fetched(folder, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('something is downloaded')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(folder / 'hub'))
    url = 'https://example.com/teacher.pth'
    config = write(folder, distil({'loss_cwd': {'type': 'CWDLoss', 'at': 'neck'}}, teacher_ckpt=url))
    assert TOOL.main([config, *SHAPE]) == 0
    text = capsys.readouterr().out
    assert 'not on this machine' in text and url in text and 'weights: random' in text
    # An earlier download is used; here one that does not fit, which strict loading tells.
    (folder / 'hub' / 'checkpoints').mkdir(parents=True)
    torch.save(dict(state_dict={'a': torch.zeros(1)}), folder / 'hub' / 'checkpoints' / 'teacher.pth')
    assert TOOL.main([config, *SHAPE]) == 1
    assert 'none of the 1 keys' in (text := capsys.readouterr().out) or 'teacher checkpoint' in text
    assert TOOL.main([config, *SHAPE, '--teacher-random']) == 0
    assert 'WARNING' not in capsys.readouterr().out


def test_the_weights_over_the_training_are_drawn_before_it(folder, capsys):
    """Every kind of weight: a list, a window, a product with a measured one; jumps are where they are."""
    losses = {
        'loss_a': {'type': 'CWDLoss', 'at': 'neck', 'loss_weight': {'levels': [1.0, 2.0, 2.0, 0.0, 1.0], 'schedule': {
            'type': 'ProductSchedule', 'schedules': [{'type': 'LinearWarmup', 'steps': 500},
                                                     {'type': 'CosineSchedule', 'final': 0.0}]}}},
        'loss_b': {'type': 'FitNetLoss', 'at': 'neck', 'loss_weight': {'type': 'WindowSchedule', 'windows': [[0, -777]],
                                                                       'value': 30.0}},
        'loss_c': {'type': 'PKDLoss', 'at': 'neck', 'loss_weight': {'type': 'ProductSchedule', 'schedules': [
            {'type': 'AutoWeight', 'share': 0.5}, {'type': 'CosineSchedule', 'final': 0.1}]}}}
    config = write(folder, distil(losses), extra="train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', "
                                                 'max_iters=90000)')
    file = folder / 'curves.png'
    assert TOOL.main([config, *SHAPE, '--plot', str(file)]) == 0
    text = capsys.readouterr().out
    assert file.read_bytes()[:4] == b'\x89PNG' and f'curves      {file}' in text
    report = inspection.check(read_config(config), (64, 64))
    found = {curve.label: curve for curve in curves_of(list(report.distiller.terms.values()), 90000)}
    assert list(found) == ['loss_a, levels 0, 4', 'loss_a, levels 1, 2', 'loss_a, level 3', 'loss_b',
                           "loss_c: 'auto', the weight follows from the share"]
    for curve in found.values():
        assert curve.steps[0] == 0 and curve.steps[-1] == 89999 and curve.steps == sorted(set(curve.steps))
    window = dict(zip(found['loss_b'].steps, found['loss_b'].values))
    assert window[89222] == 30.0 and window[89223] == 0.0
    ramp = found['loss_a, levels 1, 2']
    assert max(ramp.values) == pytest.approx(2.0, rel=1e-3) and ramp.values[0] == 0
    share = found["loss_c: 'auto', the weight follows from the share"]
    assert share.measured and max(share.values) == pytest.approx(0.5, rel=1e-2)
    assert share.values[0] == pytest.approx(0.005) and share.values[-1] == pytest.approx(0.05, rel=1e-2)

    assert TOOL.main([config, *SHAPE, '--plot', str(folder / 'no' / 'curves.png')]) == 1
    assert 'cannot be written to' in capsys.readouterr().err
    assert TOOL.main([config, *SHAPE, '--plot', str(folder / 'curves.doc')]) == 1
    assert 'curves.doc' in capsys.readouterr().err


def test_curves_without_matplotlib(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    config = write(folder, distil({'loss_a': {'type': 'CWDLoss', 'at': 'neck'}}))
    assert TOOL.main([config, *SHAPE, '--plot', str(folder / 'curves.svg')]) == 1
    assert 'Install it: pip install matplotlib' in capsys.readouterr().err


def test_epochs_are_counted_where_the_data_are_opened(coco_root, tmp_path, capsys):
    """With --plot and --data all that depends on the length of the training knows it: 8 images, 4 a step."""
    cfg = detector(coco_root, tmp_path / 'work', steps=500, by_epoch=True)
    window = dict(type='WindowSchedule', windows=[(100, -100)])
    cfg.custom_hooks = [hook(teacher_of(cfg), dict(loss_cwd=dict(type='CWDLoss', at='neck', loss_weight=window)))]
    cfg.dump(str(tmp_path / 'config.py'))
    for words, guessed in (((), True), (('--data', '1'), False), (('--plot', str(tmp_path / 'curves.svg')), False)):
        assert TOOL.main([str(tmp_path / 'config.py'), *SHAPE, *words]) == 0
        text = capsys.readouterr().out
        assert 'not all terms have a weight at step 0; step 100 was tried' in text
        assert ('an epoch taken as 7000 steps' in text) == guessed
    assert ' at 999' in text and 'a guess' not in (tmp_path / 'curves.svg').read_text()


def test_curves_of_a_training_by_epochs(folder, capsys):
    config = write(folder, distil({'loss_a': {'type': 'CWDLoss', 'at': 'neck'}}))
    assert TOOL.main([config, *SHAPE, '--plot', str(folder / 'curves.svg')]) == 0
    assert 'epoch (7000 iterations each, a guess' in (folder / 'curves.svg').read_text()
    text = capsys.readouterr().out
    assert 'the training set cannot be opened here, so an epoch is taken as 7000' in text and 'at 83999' in text
    nothing = write(folder, distil({'loss_a': {'type': 'CWDLoss', 'at': 'neck'}}), extra='train_cfg = None')
    assert TOOL.main([nothing, *SHAPE, '--plot', str(folder / 'curves.svg')]) == 1
    assert 'does not say how long it trains' in capsys.readouterr().err
