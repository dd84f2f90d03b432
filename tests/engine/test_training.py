"""The ways of training that the hosts offer, each on a real Runner."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from stock import (
    coco_data,
    detector,
    distill_hook,
    hook,
    make_runner,
    merge,
    same,
    segmentor,
    teacher_of,
    train,
    weights,
    wide,
)

from kd_mm.hosts.checkpoint import load_file
from kd_mm.hosts.zoo import zoo_config

CWD = dict(loss_cwd=dict(type='CWDLoss', at='neck', loss_weight=3.0))
MGD = dict(loss_mgd=dict(type='MGDLoss', at='neck', loss_weight=1e-3))


@pytest.fixture
def det(coco_root, tmp_path):
    return detector(coco_root, tmp_path / 'det')


def extras(runner):
    return distill_hook(runner).distiller.terms.state_dict()


# ---------------------------------------------------------------- learning rate of the adapters

SCHEDULES = dict(
    constant=[],
    warmup_multistep=[dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=3),
                      dict(type='MultiStepLR', by_epoch=False, begin=0, end=8, milestones=[5], gamma=0.1)],
    cosine=[dict(type='CosineAnnealingLR', by_epoch=False, T_max=8, eta_min=1e-5)],
    warmup_cosine=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4),
                   dict(type='CosineAnnealingLR', by_epoch=False, T_max=4, begin=4, end=8, eta_min_ratio=0.05)],
    poly=[dict(type='PolyLR', by_epoch=False, power=0.9, eta_min=1e-4, begin=0, end=8)],
    exponential=[dict(type='ExponentialLR', by_epoch=False, gamma=0.5)],
    one_cycle=[dict(type='OneCycleLR', by_epoch=False, eta_max=0.02, total_steps=8)],
    restart=[dict(type='CosineRestartLR', by_epoch=False, periods=[3, 5], restart_weights=[1.0, 0.5], eta_min=0)])


@pytest.mark.parametrize('name', SCHEDULES)
def test_adapters_follow_every_scheduler(det, name):
    det.train_cfg.max_iters = 8
    det.param_scheduler = SCHEDULES[name]
    _, record = train(det, [hook(wide(det), dict(loss_cwd=dict(CWD['loss_cwd'], levels=[0])))])
    assert len({len(rates) for rates in record.rates}) == 1 and len(record.rates[0]) == 2
    for rates in record.rates:
        assert rates[1] == pytest.approx(rates[0], rel=1e-9), record.rates


def test_adapter_lr_and_decay_multipliers(det):
    det.train_cfg.max_iters = 5
    det.param_scheduler = SCHEDULES['warmup_multistep']
    runner, record = train(det, [hook(wide(det), CWD, adapter_lr_mult=2.0, adapter_decay_mult=0.5)])
    for rates in record.rates:
        assert rates[1] == pytest.approx(2.0 * rates[0], rel=1e-9)
    assert runner.optim_wrapper.optimizer.param_groups[-1]['weight_decay'] == pytest.approx(0.5e-4)


def test_adapters_follow_paramwise_and_auto_scale(det):
    det.train_cfg.max_iters = 4
    det.param_scheduler = SCHEDULES['warmup_cosine']
    det.optim_wrapper.paramwise_cfg = dict(
        custom_keys={'backbone': dict(lr_mult=0.1, decay_mult=0.0)}, norm_decay_mult=0.0)
    det.auto_scale_lr = dict(enable=True, base_batch_size=2)  # batch 4: everything doubles
    runner, record = train(det, [hook(wide(det), CWD)])
    groups = runner.optim_wrapper.optimizer.param_groups
    # The first group is a backbone weight with a tenth of the rate; the head's have the plain one.
    plain = next(index for index, group in enumerate(groups) if any(
        p is runner.model.bbox_head.retina_cls.weight for p in group['params']))
    assert groups[0]['initial_lr'] == pytest.approx(0.002) and groups[-1]['initial_lr'] == pytest.approx(0.02)
    for rates in record.rates:
        assert rates[-1] == pytest.approx(rates[plain]) and rates[0] == pytest.approx(0.1 * rates[-1])
    assert groups[-1]['weight_decay'] == pytest.approx(1e-4)


def test_adapters_learn_and_are_clipped(det):
    det.optim_wrapper.clip_grad = dict(max_norm=1e-6)
    det.optim_wrapper.optimizer = dict(type='SGD', lr=1.0)
    norms, states = [], []

    def before_step(optimizer, *_):
        gradients = [p.grad.flatten() for p in optimizer.param_groups[-1]['params']]
        norms.append(float(torch.cat(gradients).norm()))

    def look(runner):
        if not states:
            runner.optim_wrapper.optimizer.register_step_pre_hook(before_step)
        states.append({key: value.clone() for key, value in extras(runner).items()})

    train(det, [hook(wide(det), CWD)], look)
    assert len(norms) == 1 and 0 < norms[0] <= 1.01e-6
    assert not same(*states)


# ---------------------------------------------------------------- resume

@pytest.mark.parametrize('by_epoch', [False, True])
def test_run_cut_in_half_equals_the_uncut_run(coco_root, tmp_path, by_epoch):
    """Same weights, same adapters, bit for bit: schedule, random masks, optimizer state and EMA included."""
    losses = dict(
        loss_mgd=dict(MGD['loss_mgd'], loss_weight=dict(type='CosineSchedule', value=1e-3, final=1e-4)),
        loss_fgd=dict(type='FGDLoss', at='neck', loss_weight=dict(type='LinearWarmup', steps=3)))
    ema = dict(type='EMAHook', momentum=0.1)

    def config(name, steps):
        cfg = detector(coco_root, tmp_path / name, steps=4, by_epoch=by_epoch)
        cfg.param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3)]
        cfg.default_hooks.checkpoint.interval = 2
        if steps == 2:  # stop after the checkpoint, with the schedule of the whole run
            cfg.cut_at = 2
        return cfg

    class Cut(Exception):
        pass

    def cut(runner):
        reached = runner.epoch + 1 if by_epoch else runner.iter + 1
        if (runner.work_dir.endswith('cut') and not runner._resume and reached > 2):
            raise Cut

    teacher = wide(config('whole', 4))
    whole, _ = train(config('whole', 4), [hook(teacher, losses), ema])
    with pytest.raises(Cut):
        train(config('cut', 2), [hook(teacher, losses), ema], cut)
    resumed = config('cut', 4)
    resumed.resume = True
    second, record = train(resumed, [hook(teacher, losses), ema])
    assert len(record.losses) == (4 if by_epoch else 2)
    assert same(weights(whole), weights(second))
    assert same(extras(whole), extras(second))
    name = 'epoch_4.pth' if by_epoch else 'iter_4.pth'
    first, other = (load_file(str(tmp_path / kind / name)) for kind in ('whole', 'cut'))
    assert same(first['state_dict'], other['state_dict'])
    assert same(first['ema_state_dict'], other['ema_state_dict'])


def test_resume_from_another_config_is_refused(det):
    train(det, [hook(wide(det), CWD)])
    det.resume = True
    with pytest.raises(ValueError, match='does not have this config.s adapters'):
        train(det, [hook(wide(det), dict(loss_cwd=dict(CWD['loss_cwd'], levels=[0, 1])))])


def test_load_from_a_distilled_checkpoint(det, tmp_path):
    runner, _ = train(det, [hook(wide(det), CWD)])
    det.load_from = str(Path(det.work_dir) / 'iter_2.pth')
    det.work_dir = str(tmp_path / 'next')
    det.optim_wrapper.optimizer.lr = 0.0
    det.optim_wrapper.optimizer.weight_decay = 0.0
    plain, _ = train(det)
    trained = {key: value for key, value in weights(runner).items() if 'running' not in key and 'num_b' not in key}
    assert same(trained, {key: weights(plain)[key] for key in trained})


# ---------------------------------------------------------------- wrappers, loops, hooks of the hosts

def test_ema_holds_a_plain_student(det):
    ema = dict(type='EMAHook', momentum=0.5)
    runner, _ = train(det, [ema, hook(wide(det), CWD)])
    held = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook').ema_model
    assert list(held.module.state_dict()) == list(runner.model.state_dict())
    assert not any(module._forward_hooks or 'forward' in vars(module) for module in held.modules())
    checkpoint = load_file(str(Path(det.work_dir) / 'iter_2.pth'))
    assert list(checkpoint['state_dict']) == list(runner.model.state_dict())
    assert not same(checkpoint['state_dict'], weights(runner))  # the averaged weights


def test_gradient_accumulation_equals_the_large_batch(coco_root, tmp_path):
    """Two half batches, accumulated, move adapters (no batch norm in them) as one joint batch does."""
    def run(name, batch, counts, steps):
        cfg = detector(coco_root, tmp_path / name, steps=steps)
        cfg.train_dataloader.batch_size = batch
        cfg.train_dataloader.sampler.shuffle = False
        cfg.model.backbone.norm_eval = True
        cfg.optim_wrapper.accumulative_counts = counts
        cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.1)
        losses = dict(loss_hint=dict(type='FitNetLoss', at='backbone', levels=[1], adapter=dict(
            type='ConvAdapter', always=True)))
        teacher = teacher_of(cfg, backbone=dict(depth=34))
        return train(cfg, [hook(teacher, losses, task_loss_weight=0)])[0]

    joint, halves = run('joint', 4, 1, 1), run('halves', 2, 2, 2)
    for key, value in extras(joint).items():
        torch.testing.assert_close(extras(halves)[key], value, rtol=1e-4, atol=1e-7)


def test_amp_bfloat16(det, monkeypatch):
    # mmengine refuses mixed precision without an accelerator, although torch has it on the CPU.
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)

    def look(runner):
        return {p.dtype for p in distill_hook(runner).distiller.parameters()}

    det.optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', optimizer=det.optim_wrapper.optimizer)
    losses = dict(loss_fgd=dict(type='FGDLoss', at='neck'), **CWD,
                  loss_kd=dict(type='SigmoidKDLoss', at='bbox_head.retina_cls'))
    runner, record = train(det, [hook(wide(det), losses)], look)
    for step in record.losses:
        assert all(torch.isfinite(torch.tensor(step[name])) and step[name] > 0 for name in losses)
    assert record.seen == [{torch.float32}] * 2
    plain, float_record = train(detector(det.train_dataloader.dataset.data_root, det.work_dir + '_f32'),
                                [hook(wide(det), losses)])
    assert record.losses[0]['loss_cwd'] == pytest.approx(float_record.losses[0]['loss_cwd'], rel=0.05)


def test_epoch_based_loop(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path / 'epochs', steps=2, by_epoch=True)
    cfg.log_processor.by_epoch = True
    losses = dict(loss_cwd=dict(CWD['loss_cwd'], loss_weight=dict(type='WindowSchedule', windows=[(0, -2)])))
    _, record = train(cfg, [hook(wide(cfg), losses)])
    assert ['loss_cwd' in step for step in record.losses] == [True, True, False, False]


def test_activation_checkpointing_records_once(coco_root, tmp_path):
    """With checkpointing inside the blocks the numbers are those without; taps in the recomputed part still work."""
    def run(name, checkpointing):
        cfg = detector(coco_root, tmp_path / name)
        cfg.model.backbone.with_cp = checkpointing
        losses = dict(loss_hint=dict(type='FitNetLoss', at='backbone.layer3'))
        return train(cfg, [hook(teacher_of(cfg, backbone=dict(depth=34)), losses)])

    (_, record), (other, other_record) = run('plain', False), run('cp', True)
    assert [step['loss_hint'] for step in record.losses] == pytest.approx(
        [step['loss_hint'] for step in other_record.losses], rel=1e-6)
    distiller = distill_hook(other).distiller
    assert all(tap.calls == 1 for tap in distiller.current.taps.values())


def test_layer_decay_constructor(cityscapes_root, tmp_path):
    """ConvNeXt with mmseg's layer-decay constructor: its groups carry scaled rates, the adapters' does not."""
    cfg = segmentor(cityscapes_root, tmp_path / 'decay')
    cfg.custom_imports = dict(imports=['mmpretrain'], allow_failed_imports=True)
    cfg.model.backbone = dict(
        type='BEiT', img_size=(64, 64), patch_size=16, in_channels=3, embed_dims=32, num_layers=4, num_heads=2,
        mlp_ratio=2, out_indices=(0, 1, 2, 3), qv_bias=True, init_values=0.1, drop_path_rate=0.1)
    cfg.model.decode_head = dict(
        type='FCNHead', in_channels=32, in_index=3, channels=16, num_convs=1, num_classes=19,
        norm_cfg=dict(type='BN'), loss_decode=dict(type='CrossEntropyLoss'))
    cfg.model.auxiliary_head = None
    cfg.optim_wrapper = dict(
        type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
        constructor='LayerDecayOptimizerConstructor', paramwise_cfg=dict(num_layers=4, layer_decay_rate=0.5))
    cfg.param_scheduler = SCHEDULES['warmup_multistep']
    teacher = teacher_of(cfg, backbone=dict(embed_dims=48), decode_head=dict(in_channels=48))
    losses = dict(loss_hint=dict(type='FitNetLoss', at='backbone', levels=[3]))
    runner, record = train(cfg, [hook(teacher, losses)])
    groups = runner.optim_wrapper.optimizer.param_groups
    assert groups[-1]['initial_lr'] == pytest.approx(1e-3) and groups[-1]['weight_decay'] == pytest.approx(0.05)
    head = next(index for index, group in enumerate(groups[:-1]) if group['initial_lr'] == 1e-3)
    assert all(rates[-1] == pytest.approx(rates[head]) for rates in record.rates)


def test_yolox_mode_switch(coco_root, tmp_path):
    """YOLOX with its mode-switch hook (mosaic off, L1 on) and raw 0-255 images; the teacher is a wider YOLOX."""
    cfg = Config.fromfile(str(zoo_config('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py')))
    data = coco_data(coco_root, batch=2)
    small = dict(backbone=dict(deepen_factor=0.33, widen_factor=0.125),
                 neck=dict(in_channels=[32, 64, 128], out_channels=32, num_csp_blocks=1),
                 bbox_head=dict(num_classes=2, in_channels=32, feat_channels=32),
                 data_preprocessor=dict(batch_augments=[dict(
                     type='BatchSyncRandomResize', random_size_range=(64, 96), size_divisor=32, interval=1)]))
    large = dict(backbone=dict(deepen_factor=0.33, widen_factor=0.25),
                 neck=dict(in_channels=[64, 128, 256], out_channels=64, num_csp_blocks=1),
                 bbox_head=dict(num_classes=2, in_channels=64, feat_channels=64))
    merge(cfg, dict(model=small))
    cfg.train_dataloader = dict(sampler=dict(type='DefaultSampler', shuffle=True), drop_last=True,
                                **copy.deepcopy(data['train_dataloader']))
    inner = cfg.train_dataloader.dataset
    inner.pop('_delete_')
    mosaic = [dict(type='Mosaic', img_scale=(64, 64), pad_val=114.0), inner.pipeline[-1]]
    inner.pipeline = inner.pipeline[:2]
    cfg.train_dataloader.dataset = dict(type='MultiImageMixDataset', dataset=inner, pipeline=mosaic)
    cfg.tta_model = None
    switch = dict(type='YOLOXModeSwitchHook', num_last_epochs=1, skip_type_keys=('Mosaic', ))
    from stock import finish
    finish(cfg, tmp_path / 'yolox', 3, True)
    losses = dict(loss_cwd=dict(type='CWDLoss', at='neck'), loss_kd=dict(
        type='SigmoidKDLoss', at='bbox_head.multi_level_conv_cls.*'))
    runner, record = train(cfg, [switch, hook(teacher_of(cfg, **large), losses)])
    assert all(step['loss_cwd'] > 0 and step['loss_kd'] > 0 for step in record.losses)
    assert 'loss_l1' not in record.losses[0] and 'loss_l1' in record.losses[-1]


def test_teacher_with_drop_path_is_deterministic(cityscapes_root, tmp_path):
    """A Swin teacher (DropPath, window tokens) for a CNN student, by token taps inside the stages."""
    cfg = segmentor(cityscapes_root, tmp_path / 'swin')
    swin = copy.deepcopy(cfg.model.to_dict())
    swin['backbone'] = dict(
        type='SwinTransformer', pretrain_img_size=64, embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8],
        window_size=4, drop_path_rate=0.9, out_indices=(0, 1, 2, 3), act_cfg=dict(type='GELU'),
        norm_cfg=dict(type='LN'))
    swin['decode_head'].update(in_channels=128, in_index=3)
    swin['auxiliary_head'].update(in_channels=64, in_index=2)
    teacher = dict(model=swin, default_scope='mmseg')
    losses = dict(loss_hint=dict(type='FitNetLoss', student_at='backbone.layer2',
                                 teacher_at='backbone.stages.1.blocks.0'))
    answers = []

    def look(runner):
        teacher = distill_hook(runner).distiller.teacher.model
        image = torch.ones(1, 3, 64, 64)
        with torch.no_grad():
            answers.append(all(torch.equal(a, b) for a, b in zip(teacher.backbone(image), teacher.backbone(image))))

    runner, record = train(cfg, [hook(teacher, losses)], look)
    assert answers == [True, True] and all(step['loss_hint'] > 0 for step in record.losses)


def test_several_optimizers_are_refused(det):
    runner = make_runner(det, [hook(wide(det), CWD)])
    runner.build_optim_wrapper = None
    from mmengine.optim import OptimWrapper, OptimWrapperDict
    parts = OptimWrapperDict(one=OptimWrapper(torch.optim.SGD(runner.model.parameters(), lr=0.1)))
    runner.optim_wrapper = parts
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    with pytest.raises(RuntimeError, match='one optimizer'):
        distill_hook(runner).before_run(runner)


def test_empty_data_set_is_refused(cityscapes_root, tmp_path):
    cfg = segmentor(cityscapes_root, tmp_path / 'empty')
    for kind in ('leftImg8bit', 'gtFine'):
        (tmp_path / 'nowhere' / kind / 'train').mkdir(parents=True)
    cfg.train_dataloader.dataset.update(data_root=str(tmp_path / 'nowhere'), serialize_data=False)
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    with pytest.raises(ValueError, match='training data set is empty: data_root=.*nowhere.*--cfg-options'):
        train(cfg, [hook(teacher_of(cfg), dict(loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg')))])
