"""tools/test.py with test-time augmentation, and the pictures it draws."""

import json
import pickle
import re
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.evaluation import IoUMetric
from stock import det_config, seg_config, tool, write_stock_cityscapes, write_stock_coco

from kd_mm.hosts.models import build_model

TEST = tool('test')


@pytest.fixture(autouse=True)
def no_rank_left_behind(monkeypatch):
    """The tools set LOCAL_RANK for their process, which here is that of all tests."""
    monkeypatch.setenv('LOCAL_RANK', '0')


def mirror(folder, first, second):
    """Make the second picture the first one seen in a mirror."""
    cv2.imwrite(str(folder / second), cv2.imread(str(folder / first))[:, ::-1])


def save_weights(cfg, path):
    """Weights of a narrow model, drawn once: enough for predictions, and no training."""
    torch.manual_seed(0)
    model = build_model(cfg, cfg.default_scope)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3 if 'conv_seg' in name else 0.1)
    torch.save(dict(state_dict=model.state_dict()), path)


@pytest.fixture(scope='module')
def evaluate(tmp_path_factory):
    """For each host a function that runs tools/test.py on two images, the second one the mirror of the first."""
    tmp = tmp_path_factory.mktemp('evaluate')
    roots = dict(det=write_stock_coco(tmp / 'coco'), seg=write_stock_cityscapes(tmp / 'cityscapes'))
    mirror(roots['det'] / 'val2017', '0000.png', '0001.png')
    mirror(roots['seg'] / 'leftImg8bit' / 'val' / 'town', *(
        f'town_00000{index}_000019_leftImg8bit.png' for index in range(2)))
    for name, cfg in (('det', det_config()), ('seg', seg_config(tmp))):
        cfg.test_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
        cfg.test_dataloader.dataset.indices = 2
        if name == 'det':  # its recipe has large scales; without one the tool flips
            cfg.pop('tta_pipeline')
            cfg.pop('tta_model')
        cfg.dump(str(tmp / f'{name}.py'))
        save_weights(cfg, tmp / f'{name}.pth')

    def run(name, label, *arguments):
        TEST.main([str(tmp / f'{name}.py'), str(tmp / f'{name}.pth'), '--work-dir', str(tmp / f'{name}_{label}'),
                   *map(str, arguments), '--cfg-options', f'data_root={roots[name]}',
                   f'visualizer.name={name}_{label}'])
        metrics = [json.loads(line) for path in (tmp / f'{name}_{label}').glob('*/*.json')
                   for line in path.read_text().splitlines()]
        assert any(np.isfinite(line.get('coco/bbox_mAP', line.get('mIoU', np.nan))) for line in metrics), metrics
        return tmp / f'{name}_{label}'

    return run


def mirrored_boxes(work_dir):
    """Largest difference in pixels between the 20 best boxes of the second image and the mirrored ones of the first."""
    with open(work_dir / 'predictions.pkl', 'rb') as file:
        first, second = (entry['pred_instances'] for entry in pickle.load(file))
    size = 64
    turned = first['bboxes'][:20].clone()
    turned[:, [0, 2]] = size - turned[:, [2, 0]]
    return (turned[:, None] - second['bboxes'][None]).abs().amax(dim=2).min(dim=1).values.max().item()


def mirrored_labels(folder):
    """Part of the pixels where the second image has the mirrored label of the first."""
    first, second = (cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in sorted(folder.glob('*.png')))
    assert len(np.unique(first)) > 1
    return float((first[:, ::-1] == second).mean())


def test_flips_of_a_detector_are_merged_and_pictures_drawn(evaluate, tmp_path):
    pictures = tmp_path / 'pictures'
    plain = evaluate('det', 'plain', '--out', tmp_path / 'predictions.pkl', '--show-dir', pictures)
    assert mirrored_boxes(tmp_path) > 1.0, 'the model knows no left and right, this test sees nothing'
    drawn = sorted(path for path in pictures.rglob('*.png'))
    assert [path.name.split('_')[0].split('.')[0] for path in drawn] == ['0000', '0001']
    source = cv2.imread(str(plain.parent / 'coco' / 'val2017' / '0000.png'))
    assert all((cv2.imread(str(path))[:, :source.shape[1]] != source).any() for path in drawn)
    evaluate('det', 'tta', '--out', tmp_path / 'predictions.pkl', '--tta')
    assert mirrored_boxes(tmp_path) < 0.1


def test_flips_of_a_segmentor_are_merged_and_pictures_drawn(evaluate, tmp_path):
    evaluate('seg', 'plain', '--out', tmp_path / 'plain', '--show-dir', tmp_path / 'pictures')
    assert len(list((tmp_path / 'pictures').rglob('*.png'))) == 2
    evaluate('seg', 'tta', '--out', tmp_path / 'tta', '--tta')
    assert mirrored_labels(tmp_path / 'plain') < 0.95 < 0.99 < mirrored_labels(tmp_path / 'tta')


def test_weights_of_another_model_are_not_scored(evaluate, tmp_path, capsys, monkeypatch):
    """The host leaves out in silence what does not fit, and scores what is random."""
    folder = evaluate('det', 'fitting').parent
    assert 'NOT in' not in capsys.readouterr().out
    monkeypatch.setattr(TEST, 'build_runner', lambda cfg: SimpleNamespace(
        model=build_model(cfg, cfg.default_scope), test=list))
    words = [str(folder / 'det.py'), '--work-dir', str(tmp_path / 'work'), '--cfg-options',
             f'data_root={folder / "coco"}']

    def test(weights):
        TEST.main([words[0], str(weights), *words[1:]])

    torch.save(dict(state_dict={'encoder.weight': torch.zeros(1)}), tmp_path / 'other.pth')
    with pytest.raises(SystemExit, match=r'none of the \d+ weights of the RetinaNet of this config is in .*other.pth'):
        test(tmp_path / 'other.pth')
    state = torch.load(folder / 'det.pth')['state_dict']
    for key in [key for key in state if key.startswith('neck.')]:
        del state[key]
    state['bbox_head.retina_cls.bias'] = torch.zeros(3)
    torch.save(dict(state_dict=state), tmp_path / 'part.pth')
    test(tmp_path / 'part.pth')
    assert re.search(r'kd_mm: 17 of \d+ weights of this config are NOT in .*part.pth', capsys.readouterr().out)
    (tmp_path / 'text.pth').write_text('no weights')
    with pytest.raises(SystemExit, match="text.pth cannot be loaded as a checkpoint: it is no file of torch.save"):
        test(tmp_path / 'text.pth')
    words[2] = str(tmp_path / 'text.pth')
    with pytest.raises(SystemExit, match='the work dir .*text.pth cannot be written'):
        test(folder / 'det.pth')


@pytest.mark.parametrize('kind', ['IoUMetric', 'mmseg.IoUMetric', IoUMetric])
def test_label_maps_are_kept_however_the_metric_is_named(kind, tmp_path):
    cfg = Config(dict(test_evaluator=dict(type=kind)))
    TEST.keep_seg_predictions(cfg, str(tmp_path / 'maps'))
    assert cfg.test_evaluator.output_dir == str(tmp_path / 'maps') and cfg.test_evaluator.keep_results


def test_a_segmentor_without_a_recipe_is_told_so(evaluate, tmp_path):
    with pytest.raises(SystemExit, match='--tta needs tta_model and tta_pipeline'):
        cfg = seg_config(tmp_path)
        cfg.pop('tta_pipeline')
        TEST.use_tta(cfg)
