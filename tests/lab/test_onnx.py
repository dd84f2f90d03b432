"""A plain student as ONNX: onnxruntime and the host's own post-processing find what torch finds."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from detrs import detr_config
from heads import build_head, head_config
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from stock import NARROW_FCN, detector, hook, real_pictures, retinanet_model, teacher_of, train
from two_stage import two_stage_config

from kd_mm.hosts.models import build_model
from kd_mm.hosts.pictures import find_pictures
from kd_mm.hosts.zoo import zoo_config
from kd_mm.lab.commands.export import main
from kd_mm.lab.models import random_batch, scope_of
from kd_mm.lab.onnx_export import _write, export
from kd_mm.lab.onnx_parts import Part, find_parts, flatten, restore
from kd_mm.lab.onnx_run import Agreement, Runtime, compare, difference, on_runtime, parity, prediction_pipeline

HEIGHT, WIDTH = 128, 160
ROOT = Path(__file__).resolve().parents[2]


def retinanet_config():
    cfg = Config.fromfile(str(zoo_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')))
    cfg.merge_from_dict(dict(model=dict(retinanet_model(), test_cfg=dict(score_thr=0.2))))
    return cfg


def gfl_config():
    cfg = head_config('gfl')
    cfg.merge_from_dict(dict(model=dict(test_cfg=dict(score_thr=0.2))))
    return cfg


def fcn_config():
    return Config.fromstring(NARROW_FCN, '.py')


def rcnn_config(kind):
    cfg = two_stage_config(kind)
    cfg.model.test_cfg.rcnn.score_thr = 0.2
    return cfg


def query_config(kind):
    cfg = detr_config(kind)
    cfg.merge_from_dict(dict(model=dict(test_cfg=dict(max_per_img=12))))
    return cfg


CONFIGS = dict(
    retinanet=retinanet_config, gfl=gfl_config, faster=lambda: rcnn_config('faster'),
    cascade=lambda: rcnn_config('cascade'), detr=lambda: query_config('detr'), dino=lambda: query_config('dino'),
    fcn=fcn_config)


def spread(model):
    """Predictions far enough apart that their order does not hang on the last digit."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, 'weight') and any(part in name for part in (
                    'retina_cls', 'gfl_cls', 'fc_cls', 'conv_seg', 'cls_branches', 'fc_cls')):
                module.weight.normal_()
                module.bias.zero_()
    return model


def checkpoint(folder, kind, change=None):
    """A plain student, as `kd-mm export` writes it."""
    cfg = CONFIGS[kind]()
    if change:
        change(cfg)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = build_model(cfg, cfg.default_scope)
        model.init_weights()
    path = folder / f'{kind}.pth'
    torch.save(dict(meta=dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=('a', 'b', 'c'))),
                    state_dict=spread(model).state_dict()), path)
    return path


@pytest.fixture(scope='module')
def student(tmp_path_factory):
    """A RetinaNet, and what is written of it."""
    folder = tmp_path_factory.mktemp('student')
    path = checkpoint(folder, 'retinanet')
    cfg = CONFIGS['retinanet']()
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = build_model(cfg, 'mmdet').eval()
    model.load_state_dict(torch.load(path)['state_dict'])
    with scope_of(cfg):
        parts, _ = export(model, str(folder / 'student.onnx'), (HEIGHT, WIDTH), dict(classes=['a']))
    return dict(cfg=cfg, model=model, parts=parts, path=path, folder=folder)


@pytest.mark.parametrize('kind', sorted(CONFIGS))
def test_the_same_on_images(kind, coco_root, tmp_path, capsys):
    size = (64, 64) if kind == 'fcn' else (HEIGHT, WIDTH)
    main([str(checkpoint(tmp_path, kind)), '--onnx', str(tmp_path / 'student.onnx'), '--size', *map(str, size),
          '--check', real_pictures(coco_root), '--images', '2'])
    text = capsys.readouterr().out
    assert 'onnxruntime computes what torch does' in text and 'check at' in text and '2 images' in text
    written = sorted(path.name for path in tmp_path.glob('*.onnx'))
    second = [f'student.{head}.{stage}.onnx' for head in ('bbox_head', 'mask_head') for stage in range(3)]
    files = dict(faster=['student.bbox_head.onnx', 'student.onnx'], cascade=[*second, 'student.onnx'])
    assert written == files.get(kind, ['student.onnx'])


def test_the_file_is_plain_and_says_how_to_prepare_an_image(tmp_path):
    path = checkpoint(tmp_path, 'retinanet')
    main([str(path), '--onnx', str(tmp_path / 'student.onnx'), '--size', '64', '64'])
    graph = onnx.load(tmp_path / 'student.onnx')
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} <= {'', 'ai.onnx'}
    assert b'kd_mm' not in (tmp_path / 'student.onnx').read_bytes()
    about = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    assert about['mean'] == pytest.approx([123.675, 116.28, 103.53])
    assert about['std'] == pytest.approx([58.395, 57.12, 57.375])
    assert about['classes'] == ['a', 'b', 'c'] and about['channels'] == 'RGB'


def test_a_wrong_graph_is_found(student, coco_root, tmp_path):
    """Also that the size of a graph, its file and its numbers are looked at."""
    graph = onnx.load(student['parts'][0].file)
    weights = [entry for entry in graph.graph.initializer if entry.name.endswith('retina_cls.weight')]
    assert len(weights) == 1
    values = onnx.numpy_helper.to_array(weights[0]) * 1.5
    weights[0].CopyFrom(onnx.numpy_helper.from_array(values, weights[0].name))
    other = tmp_path / 'other.onnx'
    onnx.save(graph, other)
    part = dataclasses.replace(student['parts'][0], file=str(other))
    paths = find_pictures(real_pictures(coco_root))[:1]
    with scope_of(student['cfg']):
        found = compare(student['cfg'], student['model'], [part], paths, (HEIGHT, WIDTH))
        assert found.problems and 'alone finds' in found.problems[0]
        with pytest.raises(ValueError, match='takes 1x3x128x160 and was given 1x3x64x64'):
            compare(student['cfg'], student['model'], student['parts'], paths, (64, 64))
        samples = random_batch(student['model'], 1, (HEIGHT, WIDTH), training=False)['data_samples']
        with pytest.raises(ValueError, match='differs from torch'):
            parity(student['model'], Runtime([part]), samples)
    other.write_bytes(b'no graph')
    with pytest.raises(ValueError, match='cannot load'):
        Runtime([part])


def test_nothing_of_the_torch_model_gets_into_the_check(student, coco_root):
    """With other weights in torch, onnxruntime's predictions stay what they were."""
    model, parts = student['model'], student['parts']
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.normal_()
    paths = find_pictures(real_pictures(coco_root))[:1]
    results = []
    with scope_of(student['cfg']), torch.no_grad():
        pipeline = Compose(prediction_pipeline(student['cfg'], (HEIGHT, WIDTH)))
        for network in (model, other):
            sample = pipeline(dict(img_path=paths[0], img_id=0))
            before = {name: dict(vars(module)) for name, module in network.named_modules()}
            with on_runtime(network, Runtime(parts)):
                results += network.test_step(dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']]))
            assert {name: dict(vars(module)) for name, module in network.named_modules()} == before
    first, second = (result.pred_instances for result in results)
    assert len(first) and torch.equal(first.bboxes, second.bboxes) and torch.equal(first.scores, second.scores)


def test_what_cannot_be_written_is_said(tmp_path, monkeypatch, capsys):
    path, out = checkpoint(tmp_path, 'retinanet'), str(tmp_path / 'student.onnx')
    queries = tmp_path / 'ddq.pth'
    cfg = detr_config('ddq')
    with DefaultScope.overwrite_default_scope('mmdet'):
        state = build_model(cfg, 'mmdet').state_dict()
    torch.save(dict(meta=dict(cfg=cfg.pretty_text), state_dict=state), queries)
    training = tmp_path / 'epoch_1.pth'
    torch.save(dict(torch.load(path), optimizer={}, kd_mm={}), training)
    for arguments, text in (
            ([path, '--onnx', out, '--size', '100', '64'], 'multiples of 32.*Take --size 128 64'),
            ([path, '--onnx', out, '--size', '0', '64'], 'multiples of 32'),
            ([path, '--onnx', tmp_path / 'no' / 'x.onnx'], 'no such folder'),
            ([path, '--onnx', path], 'checkpoint itself'),
            ([path, '--onnx', path, '--overwrite'], 'checkpoint itself'),
            ([path, '--onnx', out, '--size', '64', '64', '--check', tmp_path / 'no'], 'no such folder of pictures'),
            ([queries, '--onnx', out, '--size', '64', '96'], 'DDQDETR cannot be written as ONNX'),
            ([training, '--onnx', out], 'no plain student: it still has optimizer, kd_mm. Give OUT')):
        with pytest.raises(SystemExit, match=text):
            main([str(argument) for argument in arguments])
        assert not list(tmp_path.glob('*.onnx'))
    for arguments, text in (([path], 'give OUT'), ([path, 'x.pth', '--check', 'y'], 'give that one, too')):
        with pytest.raises(SystemExit):
            main([str(argument) for argument in arguments])
        assert text in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(SystemExit, match=r'need the package onnxruntime.*pip install onnx onnxruntime'):
        main([str(path), '--onnx', out, '--size', '64', '64'])


def test_operations_of_mmcv_are_named(tmp_path):
    """VFNet's deformable convolutions: the exporter writes them, and no plain onnxruntime has them."""
    model, cfg = build_head('vfnet').eval(), head_config('vfnet')
    with scope_of(cfg), pytest.raises(ValueError, match='VFNet uses operations that plain ONNX does not have: mmcv::'):
        export(model, str(tmp_path / 'student.onnx'), (HEIGHT, WIDTH), {})
    assert not list(tmp_path.iterdir())


def test_a_check_without_objects_shows_nothing(tmp_path, coco_root):
    path = checkpoint(tmp_path, 'retinanet', lambda cfg: cfg.model.test_cfg.update(score_thr=0.9999999))
    with pytest.raises(SystemExit, match='neither side finds anything'):
        main([str(path), '--onnx', str(tmp_path / 'student.onnx'), '--size', '64', '64', '--check',
              real_pictures(coco_root), '--images', '1'])


def test_heads_that_are_not_known():
    class Model(torch.nn.Module):
        def __init__(self, *names):
            super().__init__()
            for name in names:
                setattr(self, name, torch.nn.Linear(1, 1))

    assert [part.path for part in find_parts(Model('backbone', 'bbox_head', 'auxiliary_head'))] == ['bbox_head']
    with pytest.raises(ValueError, match='bbox_head and mask_head: only models with one head'):
        find_parts(Model('bbox_head', 'mask_head'))
    with pytest.raises(ValueError, match='has no head'):
        find_parts(Model('backbone'))


def test_forms():
    value = ([torch.zeros(1), None], dict(a=torch.ones(2)), 7, 'x')
    tensors = []
    form = flatten(value, tensors)
    assert len(tensors) == 2
    back = restore(form, tensors)
    assert back[0][0] is value[0][0] and back[0][1] is None and back[1]['a'] is value[1]['a'] and back[2:] == (7, 'x')


def test_differences():
    first = torch.tensor([[1., 5.], [2., 4.]])
    assert difference(first, first[[1, 0]]) > 0.1
    assert difference(first, first[[1, 0]], selects=True) == 0
    assert difference(first, first[:1]) == float('inf')
    assert difference(first, first * float('nan')) != difference(first, first)


def instances(boxes, scores, labels):
    data = InstanceData(bboxes=torch.tensor(boxes), scores=torch.tensor(scores), labels=torch.tensor(labels))
    return BaseDataElement(pred_instances=data)


def test_agreement_by_hand():
    own = instances([[0., 0., 4., 4.], [8., 8., 9., 9.], [1., 1., 2., 2.]], [0.9, 0.5, 0.1], [0, 1, 0])
    same = instances([[8., 8., 9.25, 9.], [0., 0., 4., 4.], [5., 5., 6., 6.]], [0.5, 0.9, 0.1], [1, 0, 0])
    found = Agreement()
    found.add('image', own, same)
    assert not found.problems and (found.matched, found.at_edge, found.box) == (2, 2, 0.25)
    other = instances([[0., 0., 4., 4.], [8., 8., 9., 9.], [1., 1., 2., 2.]], [0.9, 0.5, 0.1], [1, 1, 0])
    found.add('image', own, other)
    assert found.problems == ['image: torch alone finds one with score 0.900; onnxruntime alone finds one with score '
                              '0.900']
    pixels = [BaseDataElement(pred_sem_seg=PixelData(data=torch.full((1, 10, 10), label))) for label in (0, 1)]
    found.add('image', *pixels)
    assert '1e+02 % of the pixels of a label map differ' in found.problems[-1] and found.pixels == 0


BLOCK = re.compile(r'```python\n(.*?)```', re.DOTALL)


def test_a_distilled_student_runs_without_kd_mm(coco_root, tmp_path):
    """The script of docs/deploy.md: mmdet with random weights, and the file; the same boxes as plain mmdet."""
    cfg = detector(coco_root, tmp_path / 'run')
    cfg.model.test_cfg.score_thr = 0.
    teacher = teacher_of(cfg, **retinanet_model(base=12, neck=24))
    cfg.custom_hooks = [hook(teacher, dict(loss_cwd=dict(type='CWDLoss', at='neck', loss_weight=3.0)))]
    train(cfg, cfg.custom_hooks)
    main([str(tmp_path / 'run' / 'iter_2.pth'), str(tmp_path / 'student.pth'), '--onnx', str(tmp_path / 'student.onnx'),
          '--size', '64', '96'])
    script = next(block for block in BLOCK.findall((ROOT / 'docs' / 'deploy.md').read_text())
                  if 'onnxruntime' in block)
    (tmp_path / 'run.py').write_text(script)
    picture = find_pictures(str(coco_root / 'images'))[0]
    output = subprocess.run([sys.executable, 'run.py', picture], cwd=tmp_path, capture_output=True, text=True,
                            env=dict(os.environ, PYTHONPATH=''))
    assert output.returncode == 0, output.stderr[-2000:]
    rows = torch.tensor([[float(word) for word in line.split()] for line in output.stdout.splitlines()])

    exported = torch.load(tmp_path / 'student.pth', weights_only=True)
    plain = Config.fromstring(exported['meta']['cfg'], '.py')
    with scope_of(plain), torch.no_grad():
        model = build_model(plain, 'mmdet').eval()
        model.load_state_dict(exported['state_dict'])
        sample = Compose(prediction_pipeline(plain, (64, 96)))(dict(img_path=picture, img_id=0))
        found = model.test_step(dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']]))[0]
    own = found.pred_instances
    assert len(own) == len(rows) > 10
    assert torch.equal(rows[:, 0].long(), own.labels)
    assert torch.allclose(rows[:, 1], own.scores, atol=1e-4) and torch.allclose(rows[:, 2:], own.bboxes, atol=0.05)


class Bins(torch.nn.Module):
    """What PSPNet does: a map pooled into bins that do not divide it."""

    def forward(self, maps):
        return torch.nn.functional.adaptive_avg_pool2d(maps, 3),


def test_what_the_exporter_cannot_write_is_said_in_a_sentence(tmp_path, capfd):
    """Without the whole graph on the console, and with the size that would do."""
    part = Part('network', 'decode_head', str(tmp_path / 'x.onnx'), inputs=['images'],
                example=(torch.zeros(1, 2, 8, 8), ))
    with pytest.raises(ValueError, match='at decode_head: .*adaptive_avg_pool2d.*multiples of 48, by --size') as error:
        _write(Bins(), part, 17, {})
    assert 'graph(' not in ''.join(capfd.readouterr()) and 'github.com' not in str(error.value)
