"""MMYOLO: every family of its dense heads, in its own batches, loaders and hooks (``make test STACK=yolo``)."""

import copy
from pathlib import Path

import onnx
import pytest
import torch
import yaml

mmyolo = pytest.importorskip('mmyolo', reason='MMYOLO is not installed: make test STACK=yolo')

from stock import hook, losses_of, make_runner, real_pictures, train  # noqa: E402
from yolo import CLASSES, CONFIGS, SIZE, as_teacher, trainable, yolo_config  # noqa: E402

from kd_mm.engine.distiller import Distiller  # noqa: E402
from kd_mm.hosts.forward import forward_tensor  # noqa: E402
from kd_mm.hosts.heads.assigned import assignment_taps, read_assignment  # noqa: E402
from kd_mm.hosts.heads.dense import box_paths, dense_view  # noqa: E402
from kd_mm.hosts.models import build_model, class_names, start_counters  # noqa: E402
from kd_mm.hosts.places import find, meaning_at  # noqa: E402
from kd_mm.hosts.samples import samples_of  # noqa: E402
from kd_mm.hosts.taps import Tap  # noqa: E402
from kd_mm.hosts.zoo import zoo_config, zoo_weights  # noqa: E402
from kd_mm.lab.commands.export import main as export  # noqa: E402
from kd_mm.lab.configs import all_random, faults, hook_arguments, read_config  # noqa: E402
from kd_mm.lab.models import make_distiller, random_batch, scope_of  # noqa: E402
from kd_mm.ops.problems import ConfigProblems, Problems  # noqa: E402

pytestmark = pytest.mark.yolo
ROOT = Path(__file__).resolve().parents[3]
#: Families whose assignment can be read, and whose heads have towers.
ASSIGNS = [name for name in CONFIGS if name != 'yolov5']
TOWERS = ['yolov6', 'yolov6_m', 'yolov8', 'yolox', 'rtmdet']
CROSSKD = dict(loss_crosskd=dict(type='CrossKDLoss', at='bbox_head'))
DISTRIBUTIONS = {'yolov6_m': 17, 'yolov8': 16, 'ppyoloe': 17}


def build(family, seed=0):
    """The narrowed model as after some training: predictors drawn wide, so that no two predictions are alike, and norms
    with statistics of pictures."""
    torch.manual_seed(seed)
    cfg = yolo_config(family)
    with scope_of(cfg):
        model = build_model(cfg, None)
        model.init_weights()
    for module in model.bbox_head.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.1)
    model.train()
    norms = {module: module.momentum for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)}
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(random_batch(model, 2, SIZE)['inputs'], None, mode='tensor')  # some take grey levels as they are
    for norm, momentum in norms.items():
        norm.momentum = momentum
    return cfg, model


def step_of(model, data, names):
    """One training step: the losses, and what was recorded at the head and below it."""
    start_counters()
    taps = {name: Tap(model.bbox_head, name, structured=True) for name in names}
    taps[''] = Tap(model, 'bbox_head', structured=True)
    for tap in taps.values():
        tap.optional = True
        tap.arm()
    losses = model(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
    return losses, {name: tap.read() for name, tap in taps.items()}


@pytest.mark.parametrize('family', CONFIGS)
def test_features_and_logits_of_every_family(family):
    cfg, model = build(family)
    with scope_of(cfg):
        distiller = Distiller(model, as_teacher(cfg), dict(
            loss_pkd=dict(type='PKDLoss', at='@neck'), loss_logits=dict(type='SigmoidKDLoss', at='@logits'),
            loss_fgd=dict(type='FGDLoss', at='@neck', adapter=None)),
            teacher_ckpt='random', scope='mmyolo', max_steps=10, seed=1)
        losses = losses_of(model, distiller, random_batch(model, 2, SIZE))
    assert all(torch.isfinite(losses[name]) and losses[name] > 0 for name in ('loss_pkd', 'loss_logits', 'loss_fgd'))
    total = losses['loss_logits']
    total.backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.backbone.parameters())


@pytest.mark.parametrize('family', CONFIGS)
def test_logits_are_what_the_head_returns(family):
    cfg, model = build(family)
    model.eval()
    place = find(model, '@logits')
    paths = [name for name, _ in model.named_modules() for pattern in place.paths
             if name.rpartition('.')[0] == pattern.removesuffix('.*')]
    taps = [Tap(model, path) for path in [*paths, ]]
    head = Tap(model, 'bbox_head', structured=True)
    for tap in (*taps, head):
        tap.arm()
    with torch.no_grad():
        forward_tensor(model, torch.rand(2, 3, *SIZE), None)
    found = tuple(tensor for tap in taps for tensor in tap.read())
    found = found if place.pick is None else place.pick(found)
    expected = head.read().calls[0].output[0]
    assert len(found) == len(expected) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    meaning = place.meaning.of(found[0].shape[1])
    assert (meaning.kind, meaning.classes, meaning.sigmoid) == ('class', CLASSES, True)
    assert meaning.anchors == model.bbox_head.num_base_priors


@pytest.mark.parametrize('family', CONFIGS)
def test_boxes_and_distributions_are_the_hosts(family):
    """Decoded boxes are those that the head predicts with; the mean of a distribution is the distance it returns."""
    cfg, model = build(family)
    model.eval()
    head, images = model.bbox_head, torch.rand(2, 3, *SIZE)
    taps = [Tap(head, path) for path in box_paths(head)]
    for tap in taps:
        tap.arm()
    with torch.no_grad():
        output = head(model.extract_feat(images))
    numbers = [tensor for tap in taps for tensor in tap.read()]
    view = dense_view(head, output, numbers=numbers)
    assert (None if view.distributions is None else view.distributions[0].shape[-1]) == DISTRIBUTIONS.get(family)
    strides = torch.cat([torch.full((level.shape[1], ), float(stride)) for level, stride in zip(
        view.logits, head.featmap_strides)])
    flat = torch.cat([part.permute(0, 2, 3, 1).reshape(2, -1, 4) for part in output[1]], dim=1)
    expected = head.bbox_coder.decode(torch.cat(head.prior_generator.grid_priors(
        [part.shape[2:] for part in output[0]], device='cpu')), flat, strides)
    assert torch.allclose(torch.cat(view.boxes, dim=1), expected, atol=1e-3)
    plain = dense_view(head, output)
    assert plain.distributions is None and torch.allclose(torch.cat(plain.boxes, dim=1), expected, atol=1e-3)
    if len(output) > 2:
        assert torch.equal(view.quality[0], output[2][0].permute(0, 2, 3, 1).reshape(2, -1))


@pytest.mark.parametrize('family', ASSIGNS)
def test_the_assignment_is_the_hosts(family):
    cfg, model = build(family)
    head = model.bbox_head
    data = random_batch(model, 2, SIZE)
    with scope_of(cfg):
        _, records = step_of(model, data, assignment_taps(head))
    output = records[''].calls[0].output
    sizes = [level.shape[1] for level in dense_view(head, output).logits]
    calls = [call for name in assignment_taps(head) for call in records[name].calls]
    found = read_assignment(head, calls, sizes)
    samples = samples_of(data['data_samples'])
    truth, boxes = samples.labels(), samples.boxes()
    assert [level.shape for level in found.labels] == [(2, size) for size in sizes]
    labels = torch.cat(found.labels, dim=1)
    positive = (labels >= 0) & (labels < CLASSES)
    assert 0 < positive.sum() < labels.numel()
    for image in range(2):
        assert set(labels[image][positive[image]].tolist()) <= set(truth[image].tolist())
    if family == 'yolov7':
        # It may choose a cell for two objects, and trains it for both.
        cells = sum(len(part.unique(dim=0)) for part in calls[0].output['mlvl_positive_infos'])
        assert found.objects is None and int(positive.sum()) == cells
        return
    objects = torch.cat(found.objects, dim=1)
    assert bool(((objects >= 0) == positive).all())
    for image in range(2):
        chosen = objects[image][positive[image]]
        assert torch.equal(truth[image][chosen], labels[image][positive[image]])
        if isinstance(calls[0].output, dict):  # values as they were when they were assigned, not in strides
            assigned = calls[0].output['assigned_bboxes'][image][positive[image]]
            assert torch.allclose(assigned, boxes[image][chosen], atol=1e-3)


def test_both_assigners_of_the_first_epochs_and_the_others():
    from mmengine.logging import MessageHub
    cfg, model = build('yolov6')
    data, hub = random_batch(model, 2, SIZE), MessageHub.get_current_instance()
    with scope_of(cfg):
        distiller = Distiller(model, build('yolov6', seed=2)[1], CROSSKD, scope='mmyolo', max_steps=10)
        for epoch in (0, 50):
            hub.update_info('epoch', epoch)
            try:
                assert losses_of(model, distiller, data)['loss_crosskd'] > 0
            finally:
                hub.update_info('epoch', 0)


@pytest.mark.parametrize('family', ['yolov5', 'yolov7', 'ppyoloe'])
def test_what_a_head_does_not_have_is_refused_with_a_word(family):
    cfg, model = build(family)
    with scope_of(cfg), pytest.raises(ConfigProblems) as caught:
        Distiller(model, as_teacher(cfg), CROSSKD, teacher_ckpt='random', scope='mmyolo', max_steps=10)
    assert 'has no towers of convolutions' in str(caught.value)
    if family == 'yolov5':
        assert 'YOLOv5Head does not assign ground truth prior by prior' in str(caught.value)


@pytest.mark.parametrize('family', TOWERS)
def test_crosskd_where_there_are_towers(family):
    cfg, model = build(family)
    with scope_of(cfg):
        # Not 'random': YOLOv6 starts with predictors of zeros, which say the same of any feature.
        distiller = Distiller(model, build(family, seed=2)[1], CROSSKD, scope='mmyolo', max_steps=10)
        losses = losses_of(model, distiller, random_batch(model, 2, SIZE))
    losses['loss_crosskd'].backward()
    towers = [p for name, p in model.bbox_head.named_parameters() if 'weight' in name and p.grad is not None]
    assert losses['loss_crosskd'] > 0 and any(bool(p.grad.abs().sum() > 0) for p in towers)


@pytest.mark.parametrize('family', DISTRIBUTIONS)
def test_localization_distillation_of_dfl(family):
    cfg, model = build(family)
    _, teacher = build(family, seed=5)
    data = random_batch(model, 2, SIZE)
    losses = dict(loss_ld=dict(type='LDLoss', at='bbox_head', valuable_weight=0, tau=1.0))
    with scope_of(cfg):
        found = losses_of(model, Distiller(model, teacher, losses, scope='mmyolo', max_steps=10), data)
        assert found['loss_ld'] > 1e-4
        found['loss_ld'].backward()
        predictors = model.bbox_head.head_module.reg_preds
        assert sum(float(parameter.grad.abs().sum()) for parameter in predictors.parameters()) > 0
        same = losses_of(model, Distiller(model, copy.deepcopy(model), losses, scope='mmyolo', max_steps=10), data)
        # Norms of the student take statistics of the batch, so equal weights do not give equal outputs.
        assert torch.isfinite(same['loss_ld'])
        with pytest.raises(ConfigProblems, match='has no anchors.*valuable_weight=0'):
            Distiller(model, teacher, dict(loss_ld=dict(type='LDLoss', at='bbox_head')), scope='mmyolo', max_steps=10)
    meaning = meaning_at(model, 'bbox_head.head_module.reg_preds.0')
    assert (meaning.kind, meaning.bins) == ('distribution', DISTRIBUTIONS[family])


def test_box_branches_without_bins():
    assert meaning_at(build('yolov6')[1], 'bbox_head.head_module.reg_preds.0').kind == 'box'
    assert meaning_at(build('yolox')[1], 'bbox_head.head_module.multi_level_conv_obj.1').kind == 'objectness'


def test_labels_are_read_before_the_head_rewrites_them():
    """YOLOv5 and YOLOv7 turn the boxes of the batch into centres and sizes, in place, while they compute their loss."""
    cfg, model = build('yolov5')
    data = random_batch(model, 2, SIZE)
    table = data['data_samples']['bboxes_labels']
    samples, before = samples_of(data['data_samples']), table.clone()
    with scope_of(cfg):
        model(data['inputs'], data['data_samples'], mode='loss')
    assert not torch.equal(table, before)
    assert torch.equal(torch.cat(samples.boxes()), before[:, 2:])
    assert [len(labels) for labels in samples.labels()] == [int((before[:, 0] == index).sum()) for index in range(2)]
    assert samples.img_shapes(None) == [SIZE] * 2
    assert samples.masks() is None and not samples.has_seg_map()


@pytest.mark.parametrize('family', [name for name in CONFIGS if name != 'yolov6_m'])
def test_a_real_run_with_its_loader_hooks_and_schedule(family, coco_root, tmp_path):
    """Fast collate, EMA with the exponential momentum, the switch of the pipeline, its optimizer constructor."""
    cfg = trainable(yolo_config(family), coco_root, tmp_path / 'work')
    stage2 = copy.deepcopy(cfg.train_dataloader.dataset.pipeline)
    stage2.insert(-1, dict(type='mmdet.RandomFlip', prob=1.0))
    hooks = [dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0001, update_buffers=True, strict_load=False,
                  priority=49),
             dict(type='mmdet.PipelineSwitchHook', switch_epoch=1, switch_pipeline=stage2)]
    if family == 'yolox':
        hooks[1] = dict(type='YOLOXModeSwitchHook', num_last_epochs=1, new_train_pipeline=stage2)
    keys = list(build(family)[1].state_dict())
    losses = dict(loss_pkd=dict(type='PKDLoss', at='@neck'), loss_logits=dict(type='SigmoidKDLoss', at='@logits'))
    if family in TOWERS:
        losses.update(CROSSKD)
    hooks += [hook(as_teacher(cfg), losses), dict(type='kd_mm.DistillVisHook', interval=2)]
    runner, recorder = train(cfg, hooks)
    assert len(recorder.losses) == 4  # two epochs of 8 images
    for seen in recorder.losses:
        # At first the predictors of some families are zeros, which say the same whatever came before.
        assert seen['loss_pkd'] > 0 and 'loss_cls' in seen
        assert all(seen[name] > -1e-6 for name in losses)
    assert list((tmp_path / 'work').rglob('distill_vis/*.png'))
    switched = runner.train_dataloader.dataset.pipeline.transforms  # what flips was not there in the first epoch
    assert any(type(transform).__name__ == 'RandomFlip' for transform in switched)
    assert list(runner.model.state_dict()) == keys
    saved = torch.load(next((tmp_path / 'work').glob('epoch_*.pth')), weights_only=False)
    assert list(saved['state_dict']) == keys and 'ema_state_dict' in saved
    assert not any('kd_mm' in key for key in saved['ema_state_dict'])


def test_a_config_that_inherits_by_its_scope(coco_root, tmp_path):
    """mmengine notes the scope of such a base in the collate function, too, which the Runner then calls with it."""
    path = tmp_path / 'student.py'
    path.write_text(f"_base_ = 'mmyolo::{CONFIGS['yolov8']}'\n")
    cfg = read_config(str(path))
    assert cfg.train_dataloader.collate_fn == dict(type='yolov5_collate') and cfg.model._scope_ == 'mmyolo'
    cfg.model = yolo_config('yolov8').model
    runner, recorder = train(trainable(cfg, coco_root, tmp_path / 'work'), [])
    assert len(recorder.losses) == 4


def test_weight_zero_is_no_hook(coco_root, tmp_path):
    found = []
    for index, hooks in enumerate(([], [hook(as_teacher(yolo_config('yolov5')), dict(
            loss_pkd=dict(type='PKDLoss', at='@neck', loss_weight=0)))])):
        cfg = trainable(yolo_config('yolov5'), coco_root, tmp_path / str(index))
        runner, _ = train(cfg, hooks)
        found.append({name: value.clone() for name, value in runner.model.state_dict().items()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize('family', ['yolov6', 'yolov7_l', 'ppyoloe'])
def test_reparametrised_blocks(family):
    """A teacher in its deployed form teaches the same as in its training form; so does the student after its switch."""
    from mmyolo.models import RepVGGBlock
    from mmyolo.utils import switch_to_deploy
    cfg, model = build(family)
    _, teacher = build(family, seed=3)
    deployed = copy.deepcopy(teacher).eval()
    switch_to_deploy(deployed)
    assert any(isinstance(module, RepVGGBlock) and hasattr(module, 'rbr_reparam') for module in deployed.modules())
    data = random_batch(model, 2, SIZE)
    values = []
    with scope_of(cfg):
        for form in (teacher, deployed):
            distiller = Distiller(model, form, dict(
                loss_pkd=dict(type='PKDLoss', at='@neck'), loss_logits=dict(type='SigmoidKDLoss', at='@logits'),
                loss_stage=dict(type='FitNetLoss', at='backbone')), scope='mmyolo', max_steps=10)
            values.append({name: float(value) for name, value in losses_of(model, distiller, data).items()
                           if name in ('loss_pkd', 'loss_logits', 'loss_stage')})
    assert all(abs(values[0][name] - values[1][name]) < 1e-3 * abs(values[0][name]) + 1e-5 for name in values[0])
    student = copy.deepcopy(model).eval()
    with torch.no_grad():
        before = student(data['inputs'], None, mode='tensor')
        switch_to_deploy(student)
        after = student(data['inputs'], None, mode='tensor')
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(before[0], after[0]))
    # Who tunes a deployed student further distils it from a teacher in either form; the switch froze what it merged.
    for form in (teacher, deployed):
        student.train().requires_grad_(True).zero_grad()
        with scope_of(cfg):
            found = losses_of(student, Distiller(student, form, dict(
                loss_pkd=dict(type='PKDLoss', at='@neck'), loss_logits=dict(type='SigmoidKDLoss', at='@logits')),
                scope='mmyolo', max_steps=10), data)
        (found['loss_pkd'] + found['loss_logits']).backward()
        merged = [module.rbr_reparam.weight for module in student.modules() if hasattr(module, 'rbr_reparam')]
        assert found['loss_pkd'] > 0 and merged and all(bool(weight.grad.abs().sum() > 0) for weight in merged)


@pytest.mark.parametrize('family, config', [('yolov6', 'deployed'), ('yolov6', 'training'), ('yolov7_l', 'training')])
def test_a_deployed_checkpoint_of_a_teacher(family, config, tmp_path):
    """Weights after the switch have other keys than the training form, whose blocks are switched for them."""
    from mmyolo.utils import switch_to_deploy
    cfg, model = build(family)
    _, trained = build(family, seed=4)
    trained.eval()
    whole = copy.deepcopy(trained)
    switch_to_deploy(trained)
    torch.save(dict(state_dict=trained.state_dict()), tmp_path / 'deployed.pth')
    source = as_teacher(cfg)
    if config == 'deployed':
        source['model']['backbone']['block_cfg'] = dict(type='RepVGGBlock', deploy=True)
        source['model']['neck']['block_cfg'] = dict(type='RepVGGBlock', deploy=True)
    losses = dict(loss_pkd=dict(type='PKDLoss', at='@neck'), loss_mse=dict(type='FitNetLoss', at='@neck', adapter=None))
    data = random_batch(model, 2, SIZE)
    with scope_of(cfg):
        distiller = Distiller(model, source, losses, teacher_ckpt=str(tmp_path / 'deployed.pth'), scope='mmyolo')
        found = losses_of(model, distiller, data)
        expected = losses_of(model, Distiller(model, whole, losses, scope='mmyolo'), data)
        assert all(found[name] > 0 and torch.allclose(found[name], expected[name], rtol=1e-3) for name in losses)
        state = trained.state_dict()
        state.pop(next(key for key in state if key.endswith('rbr_reparam.bias')))
        torch.save(dict(state_dict=state), tmp_path / 'part.pth')
        with pytest.raises(ConfigProblems, match='rbr_reparam'):
            Distiller(model, as_teacher(cfg), losses, teacher_ckpt=str(tmp_path / 'part.pth'), scope='mmyolo')


@pytest.mark.parametrize('family, form', [
    ('yolov6', 'training'), ('yolov6', 'deployed'), ('yolov7_l', 'training'), ('yolov7_l', 'deployed'),
    ('ppyoloe', 'training'), ('yolov8', 'training'), ('rtmdet', 'training'), ('yolov5', 'training'),
    ('yolox', 'training')])
def test_a_student_as_onnx(family, form, coco_root, tmp_path, capsys):
    """From a training form, and from weights that were switched before: the same detections on images, and in the graph
    a re-parametrised block is one convolution."""
    from mmyolo.utils import switch_to_deploy
    cfg, model = build(family)
    model.eval()
    if form == 'deployed':
        switch_to_deploy(model)
    cfg.model.test_cfg.update(score_thr=0.05, nms_pre=100, max_per_img=20)
    path = tmp_path / 'student.pth'
    torch.save(dict(meta=dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=('a', 'b'))),
                    state_dict=model.state_dict()), path)
    export([str(path), '--onnx', str(tmp_path / 'student.onnx'), '--size', *map(str, SIZE), '--check',
            real_pictures(coco_root), '--images', '2'])
    text = capsys.readouterr().out
    assert 'onnxruntime computes what torch does' in text and '2 images' in text
    graph = onnx.load(tmp_path / 'student.onnx')
    calls = []
    merged = copy.deepcopy(model)
    switch_to_deploy(merged)
    for module in merged.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        forward_tensor(merged, torch.rand(1, 3, *SIZE), None)
    assert [node.op_type for node in graph.graph.node].count('Conv') == len(calls)


def test_sync_bn_of_a_teacher_is_folded_like_any_other():
    cfg, model = build('yolov8')
    _, teacher = build('yolov8', seed=6)
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(teacher)).eval()
    data, values = random_batch(model, 2, SIZE), []
    with scope_of(cfg):
        for form in (teacher, synced):
            distiller = Distiller(model, form, dict(loss_pkd=dict(type='PKDLoss', at='@neck')), scope='mmyolo')
            values.append(float(losses_of(model, distiller, data)['loss_pkd']))
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_its_configs_are_read_with_names_and_weights():
    path = zoo_config('mmyolo::rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco.py')
    assert zoo_weights(str(path)).endswith('rtmdet_s_syncbn_fast_8xb32-300e_coco_20221230_182329-0a8c901a.pth')
    cfg = read_config('mmyolo::rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco.py')
    assert len(class_names(cfg)) == 80


def test_pictures_beside_are_refused_with_a_word(coco_root, tmp_path):
    cfg = trainable(yolo_config('yolov8'), coco_root, tmp_path / 'work')
    runner = make_runner(cfg, [hook(as_teacher(cfg), dict(loss_pkd=dict(type='PKDLoss', at='@neck')),
                                    input_key='infrared')])
    with pytest.raises(ValueError, match="input_key='infrared'"):
        runner.train()


@pytest.mark.parametrize('name, steps', [('tiny_from_s', True), ('s_from_m', False), ('m_from_l', False)])
def test_its_own_recipe(name, steps):
    """The shipped configs find their taps, and the smallest of them makes a step as it is."""
    cfg = read_config(str(ROOT / 'configs' / 'yolo' / f'cwd_mmyolo_rtmdet_{name}_300e_coco.py'))
    assert not faults(cfg) and [entry.type for entry in cfg.custom_hooks] == [
        'EMAHook', 'mmdet.PipelineSwitchHook', 'kd_mm.DistillHook']
    entry = cfg.custom_hooks[-1]
    assert entry.teacher_ckpt == zoo_weights(str(zoo_config(entry.teacher)))
    published = (zoo_config('mmyolo::rtmdet/distillation/kd_s_rtmdet_m_neck_300e_coco.py').parent.parent
                 / 'metafile.yml').read_text()
    student, teacher = name.split('_from_')
    models = {model['Name']: model for model in yaml.safe_load(published)['Models']}
    row = next(line for line in (ROOT / 'configs' / 'yolo' / 'README.md').read_text().splitlines()
               if f'_{name}_' in line)
    points = [models[name]['Results'][0]['Metrics']['box AP'] for name in (
        f'rtmdet_{teacher}_syncbn_fast_8xb32-300e_coco', f'rtmdet_{student}_syncbn_fast_8xb32-300e_coco',
        f'kd_{student}_rtmdet_{teacher}_neck_300e_coco')]
    assert [float(cell) for cell in row.split('|')[3:6]] == points
    if not steps:
        return
    cfg.model.backbone.init_cfg = None
    with scope_of(cfg):
        model = build_model(cfg, None)
        distiller = make_distiller(cfg, model, all_random(hook_arguments(entry, Problems())))
        losses = losses_of(model.train(), distiller, random_batch(model, 2, SIZE))
    assert losses['loss_cwd'] > 0 and len(distiller.terms['loss_cwd'].student_paths) == 3
