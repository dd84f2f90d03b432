"""Facts of the host in ARCHITECTURE.md, by number, that the code is built on: when a host changes one, this says which.

The others are tested where they matter: learning rates, EMA, DDP and checkpoints in tests/engine, taps in
tests/hosts/test_taps.py.
"""

import copy

import pytest
import torch
from mmengine.config import utils
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from stock import detector, make_runner, segmentor

from kd_mm.hosts.synthetic import synthetic_batch


class Order(Hook):
    """Notes which calls of the Runner it hears, and what is there at each."""

    def __init__(self):
        self.heard = []

    def before_run(self, runner):
        loops = runner._train_loop, runner.optim_wrapper
        self.heard.append(('before_run', not any(isinstance(part, dict) or part is None for part in loops)))

    def before_train(self, runner):
        self.heard.append(('before_train', bool(runner.model._is_init)))

    def before_train_epoch(self, runner):
        self.heard.append(('before_train_epoch', None))


def test_1_and_13_before_run_knows_the_optimizer_and_an_epoch_of_iterations_begins_once(cityscapes_root, tmp_path):
    pytest.importorskip('mmseg')
    order = Order()
    runner = make_runner(segmentor(cityscapes_root, tmp_path, steps=3))
    runner.register_hook(order)
    runner.train()
    assert order.heard == [('before_run', True), ('before_train', True), ('before_train_epoch', None)]


def test_2_a_forward_hook_may_return_other_losses(coco_root, tmp_path):
    pytest.importorskip('mmdet')
    model = make_runner(detector(coco_root, tmp_path)).model

    def add(module, args, kwargs, losses):
        assert kwargs['mode'] == 'loss'
        return dict(losses, loss_more=torch.ones(()))

    handle = model.register_forward_hook(add, with_kwargs=True)
    data = model.data_preprocessor(synthetic_batch(model, 2, (64, 64)), True)
    assert 'loss_more' in model(**data, mode='loss')
    handle.remove()
    assert 'loss_more' not in model(**data, mode='loss')


def test_5_a_forward_hook_on_a_decode_head_never_fires(cityscapes_root, tmp_path):
    pytest.importorskip('mmseg')
    model = make_runner(segmentor(cityscapes_root, tmp_path)).model
    fired = []
    model.decode_head.register_forward_hook(lambda *_: fired.append('head'))
    model.decode_head.conv_seg.register_forward_hook(lambda *_: fired.append('conv_seg'))
    model(**model.data_preprocessor(synthetic_batch(model, 2, (64, 64)), True), mode='loss')
    assert fired == ['conv_seg']


def test_5_nor_on_a_bbox_head_without_losses_and_6_a_shared_convolution_runs_once_a_level(coco_root, tmp_path):
    pytest.importorskip('mmdet')
    model = make_runner(detector(coco_root, tmp_path)).model
    fired = []
    model.bbox_head.register_forward_hook(lambda *_: fired.append('head'))
    model.bbox_head.retina_cls.register_forward_hook(lambda *_: fired.append('retina_cls'))
    data = model.data_preprocessor(synthetic_batch(model, 2, (64, 64)), True)
    model(**copy.deepcopy(data), mode='tensor')
    assert fired == ['retina_cls'] * 5


def test_10_only_keys_that_contain_loss_are_summed():
    total, _ = BaseModel.parse_losses(
        None, dict(loss_a=torch.ones(()), b_loss=torch.ones(()), kd=torch.full((), 100.0)))
    assert total.item() == 2.0


def test_19_packages_for_base_come_from_mmengines_own_table():
    assert 'mmdet' in utils.MODULE2PACKAGE and 'kd_mm' not in utils.MODULE2PACKAGE
