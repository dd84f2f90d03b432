"""Gradient accumulation: what is trained or averaged beside the student goes with its optimizer's steps."""

import pytest
import torch
from mmengine.hooks import Hook
from stock import detector, distill_hook, hook, same, segmentor, teacher_of, train

HOLISTIC = dict(type='SKDHolisticLoss', at='decode_head.conv_seg', width=2, optimizer=dict(type='SGD', lr=0.01))


class Counts(Hook):
    """Steps of the student's optimizer and of the opponent's, and the opponent's gradient at each of its steps."""

    def __init__(self):
        self.student, self.opponent, self.gradients = 0, 0, []

    def before_train(self, runner):
        found, = distill_hook(runner).distiller.opponents()
        runner.optim_wrapper.optimizer.register_step_post_hook(self.count_student)
        found.optimizer.register_step_pre_hook(self.count_opponent)

    def count_student(self, *_):
        self.student += 1

    def count_opponent(self, optimizer, *_):
        self.opponent += 1
        self.gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group['params']])


def adversarial(root, work_dir, counts, steps, batch=4):
    cfg = segmentor(root, work_dir, steps=steps)
    cfg.model.decode_head.dropout_ratio = cfg.model.auxiliary_head.dropout_ratio = 0.0
    cfg.train_dataloader.batch_size, cfg.train_dataloader.sampler.shuffle = batch, False
    cfg.optim_wrapper.accumulative_counts = counts
    return cfg, [hook(teacher_of(cfg), dict(loss_holistic=HOLISTIC))]


@pytest.mark.parametrize(('counts', 'steps', 'expected'), [(1, 4, 4), (4, 8, 2), (4, 6, 2)])
def test_opponents_step_as_often_as_the_student(cityscapes_root, tmp_path, counts, steps, expected):
    """The last steps of a length that is no multiple count as one, as for the host."""
    cfg, hooks = adversarial(cityscapes_root, tmp_path, counts, steps)
    count = Counts()
    runner, record = train(cfg, [*hooks, count])
    assert (count.student, count.opponent) == (expected, expected)
    opponent, = distill_hook(runner).distiller.opponents()
    assert all(p.grad is None and not p.requires_grad for p in opponent.network.parameters())
    assert len(runner.message_hub.get_scalar('train/kd_opponent_holistic').data[0]) == steps


def test_the_gradient_is_the_mean(cityscapes_root, tmp_path):
    """The same batch twice gives the gradient of once, with everything frozen that a forward pass moves."""
    found = []
    for counts in (1, 3):
        cfg, hooks = adversarial(cityscapes_root, tmp_path, counts, steps=counts, batch=8)
        cfg.optim_wrapper.optimizer.lr = 0.0
        hooks[0]['losses']['loss_holistic'] = dict(HOLISTIC, objective='hinge')
        count = Counts()
        train(cfg, [*hooks, count, Still()])
        found.append(count.gradients)
    (one, ), (mean, ) = found
    assert any(bool(gradient.any()) for gradient in one)
    for first, second in zip(one, mean):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-6)


class Still(Hook):
    """Statistics and power iterations stay what they were before the first step."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        found, = distill_hook(runner).distiller.opponents()
        for model in (runner.model, found.network):
            for module in model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.momentum = 0.0
        state = dict(found.network.named_buffers())
        if batch_idx == 0:
            self.kept = {name: value.clone() for name, value in state.items()}
        for name, value in state.items():
            value.copy_(self.kept[name])


def test_the_average_moves_as_often_as_the_student(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path, steps=6)
    cfg.optim_wrapper.accumulative_counts = 4
    entry = hook(dict(type='EMATeacher', momentum=0.25), dict(loss_cwd=dict(type='CWDLoss', at='neck')))
    states = []

    def look(runner):
        own = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
        mean = {name: p.clone() for name, p in distill_hook(runner).distiller.teacher.model.named_parameters()}
        states.append((own, mean))
        return None

    train(cfg, [entry], look)
    students, means = zip(*states)
    assert [same(means[step], means[step - 1]) for step in range(1, 6)] == [True, True, False, True, False]
    assert [same(students[step], students[step - 1]) for step in range(1, 6)] == [True, True, False, True, False]
    for name, value in means[3].items():
        torch.testing.assert_close(value, 0.75 * means[2][name] + 0.25 * students[3][name])


def test_without_accumulation_nothing_changes(coco_root, tmp_path):
    """A count of 1 is a step in every iteration."""
    cfg = detector(coco_root, tmp_path, steps=3)
    entry = hook(dict(type='EMATeacher', momentum=0.25), dict(loss_cwd=dict(type='CWDLoss', at='neck')))
    means = []
    train(cfg, [entry], lambda runner: means.append(
        {name: p.clone() for name, p in distill_hook(runner).distiller.teacher.model.named_parameters()}))
    assert not same(means[0], means[1]) and not same(means[1], means[2])
