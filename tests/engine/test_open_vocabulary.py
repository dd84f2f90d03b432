"""Grounding DINO and GLIP of mmdet label for a student that knows a few classes: the real models, narrowed."""

import copy

import pytest
import torch
from foundation import require
from heads import head_config
from stock import detector, labels_hook, train

from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.models import build_model
from kd_mm.hosts.synthetic import synthetic_batch

require('transformers')

from language import CONFIGS, open_vocabulary  # noqa: E402

PROMPTS = ('a ball', 'star', 'square')
LABELS = dict(type='PseudoLabels', score=0.0, iou=1.0, min_size=0.0, prompts=PROMPTS,
              classes={'a ball': 'disc', 'square': 'square'})


def made(*arguments):
    return dict(model=open_vocabulary(*arguments).model.to_dict(), default_scope='mmdet')


@pytest.fixture(scope='module', params=CONFIGS)
def teacher(request, tmp_path_factory):
    return made(request.param, tmp_path_factory.mktemp('bert'))


@pytest.mark.parametrize('config', CONFIGS)
def test_labels_are_what_it_finds_for_the_names(config, tmp_path):
    teacher = made(config, tmp_path, len(PROMPTS))
    student = build_model(head_config('retinanet'), 'mmdet')
    distiller = Distiller(student, teacher, None, teacher_ckpt='random', scope='mmdet', speed='exact',
                          classes=['disc', 'square', 'hexagon'], labels=LABELS)
    assert any('labels a ball as disc, 1 class by the same name (2 classes of its 3)' in note
               for note in distiller.labelling.notes)
    data = student.data_preprocessor(synthetic_batch(student, 2, (64, 96)), True)
    step, model = distiller.current, distiller.teacher.model
    step.begin(**data)
    step.teach(**data)
    new = step.label(**data)
    images, samples = distiller.teacher.prepare(data['inputs'], copy.deepcopy(data['data_samples']), step.batch)
    for sample in samples:
        sample.set_metainfo(dict(text=PROMPTS, custom_entities=True))
    with torch.no_grad():
        found = model.predict(images, samples, rescale=False)
    seen = set()
    for result, old, sample in zip(found, data['data_samples'], new):
        wanted = result.pred_instances
        wanted = wanted[(wanted.scores > 0) & (wanted.labels != 1)]  # the student knows no star
        more = sample.gt_instances[len(old.gt_instances):]
        boxes = wanted.bboxes.clamp(min=0).minimum(torch.tensor([96., 64., 96., 64.]))
        inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        assert len(more) == inside.sum() > 0
        torch.testing.assert_close(more.bboxes, boxes[inside], rtol=1e-4, atol=1e-3)
        assert torch.equal(more.labels, wanted.labels[inside] // 2)  # ball 0 -> disc 0, square 2 -> square 1
        seen |= set(wanted.labels.tolist())
    assert seen == {0, 2}
    step.clear()


def test_a_student_learns_what_it_says(teacher, coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path)
    cfg.train_dataloader.dataset.pipeline = [step for step in cfg.train_dataloader.dataset.pipeline
                                             if step['type'] != 'LoadAnnotations']
    losses = dict(loss_pkd=dict(type='PKDLoss', at='@neck'))
    runner, record = train(cfg, [labels_hook(teacher, LABELS, losses)])
    assert runner.message_hub.log_scalars['train/kd_labels_boxes'].current() > 0
    assert all(step['loss_bbox'] > 0 and step['loss_pkd'] > 0 for step in record.losses)


def test_without_prompts_the_samples_say_what_to_look_for(teacher, coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path)
    hook = labels_hook(teacher, dict(type='PseudoLabels', score=0.0, iou=1.0, min_size=0.0, classes='positional'))
    with pytest.raises(ValueError, match=r"the samples have no `text`. Give labels=dict\(..., prompts="):
        train(cfg, [hook])
    cfg.train_dataloader.dataset.return_classes = True
    pack = cfg.train_dataloader.dataset.pipeline[-1]
    pack.meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction', 'text',
                      'custom_entities')
    runner, _ = train(cfg, [hook])
    assert runner.message_hub.log_scalars['train/kd_labels_boxes'].current() > 0
