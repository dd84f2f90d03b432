"""What methods learn from a frozen teacher, on stock models."""

import copy

import pytest
import torch
from mmengine.config import Config
from stock import detector, segmentor
from torch import nn

from kd_mm.hosts.models import build_model
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.lab import learning
from kd_mm.registry import build


def teacher_of(cfg, scope):
    model = build_model(Config(dict(model=cfg.model.to_dict(), default_scope=scope)), scope)
    model.init_weights()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope='module')
def segmenter():
    torch.manual_seed(0)
    return teacher_of(segmentor('.', '.'), 'mmseg')


@pytest.fixture(scope='module')
def retinanet():
    torch.manual_seed(0)
    return teacher_of(detector('.', '.'), 'mmdet')


def lessons(**losses):
    return learning.find_lessons(losses)


def maskd(at, **options):
    return dict(dict(type='MasKDLoss', at=at, tokens='unused.pth', num_tokens=4), **options)


def batches(model, count=1):
    return [synthetic_batch(model, 2, (64, 64)) for _ in range(count)]


def test_exchange_changes_what_the_model_goes_on_with_and_leaves_no_trace():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with learning.Exchange(model, ['0'], lambda path, number, tensor: tensor * 2 + number):
        assert model(torch.ones(1)).item() == 2.0
        assert model(torch.ones(1)).item() == 3.0  # the second call of the same module
    assert model(torch.ones(1)).item() == 1.0 and 'forward' not in vars(model[0])


def test_exchange_leaves_no_trace_of_a_module_named_twice_or_of_a_start_that_fails():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with learning.Exchange(model, ['0', '0'], lambda path, number, tensor: tensor + 1):
        assert model(torch.ones(1)).item() == 3.0
    assert 'forward' not in vars(model[0])
    started = learning.Exchange(model, ['0', '1'], lambda path, number, tensor: tensor)
    started.places[1] = ('1', model[1], 'gone')
    with pytest.raises(AttributeError), started:
        pass
    assert 'forward' not in vars(model[0])


def test_exchange_keeps_the_structure_of_the_output():
    class Split(nn.Module):
        def forward(self, x):
            return (x, dict(a=[x + 1], n=3)), torch.zeros(1, dtype=torch.long)

    model, seen = nn.Sequential(Split()), []
    with learning.Exchange(model, ['0'], lambda path, number, tensor: seen.append(number) or -tensor):
        (first, rest), labels = model(torch.ones(1))
    assert first.item() == -1 and rest['a'][0].item() == -2 and rest['n'] == 3 and labels.item() == 0
    assert seen == [0, 1]


def test_tokens_of_a_segmentor(segmenter):
    found = lessons(loss_maskd=maskd('decode_head.conv_seg'))
    before = copy.deepcopy(segmenter.state_dict())
    seen = []
    torch.manual_seed(0)
    learning.learn(segmenter, found, batches(segmenter), 41, 2.0, lambda *args: seen.append(args))
    learner = found[0].learner
    assert learner.levels[0].tokens.shape == (4, 19)
    assert seen[0][2]['loss_maskd'] > 0.99 and seen[-1][2]['loss_maskd'] < 0.9  # the masks part
    assert seen[0][2]['task'] > 0 and [args[:2] for args in seen] == [(1, 41), (41, 41)]
    # Nothing of the teacher moves, not even statistics, and its module is itself again.
    after = segmenter.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(parameter.grad is None for parameter in segmenter.parameters())
    assert 'forward' not in vars(segmenter.decode_head.conv_seg)


def test_the_task_of_the_teacher_is_part_of_the_objective(segmenter):
    found = lessons(loss_maskd=maskd('decode_head.conv_seg', token_weights='mean'))
    data = batches(segmenter)[0]
    school = learning.School(segmenter, found, data)
    plain = school.step(data)['task']
    module = found[0].learner.levels[0]
    module.tokens.data.zero_()
    grads = torch.autograd.grad(plain, module.tokens, allow_unused=True)
    assert grads[0] is not None and grads[0].abs().sum() > 0
    # Four masks of one half show the logits twice as large: the task loss is another one.
    with torch.no_grad():
        logits = segmenter.data_preprocessor(data, True)
        alone, _ = segmenter.parse_losses(segmenter(**logits, mode='loss'))
        module.tokens.data[:2] = 0
        doubled = school.step(data)['task']
    assert not torch.isclose(doubled, alone, rtol=1e-3)


def test_tokens_of_a_detector_one_set_a_level(retinanet):
    found = lessons(loss_maskd=maskd('neck', levels=[0, 2, -1]))
    learning.learn(retinanet, found, batches(retinanet), 2)
    assert [level.tokens.shape[1] for level in found[0].learner.levels] == [16, 16, 16]
    assert found[0].spots == {('neck', 0): 0, ('neck', 2): 1, ('neck', 4): 2}


def test_a_head_shared_by_the_levels(retinanet):
    found = lessons(loss_maskd=maskd('bbox_head.retina_cls'))
    school = learning.School(retinanet, found, batches(retinanet)[0])
    assert len(found[0].learner.levels) == 5 and found[0].spots[('bbox_head.retina_cls', 3)] == 3
    assert school.step(batches(retinanet)[0])['loss_maskd'] > 0


def test_what_is_saved_is_what_the_loss_takes(segmenter, tmp_path):
    found = learning.find_lessons(dict(loss_maskd=maskd('decode_head.conv_seg')), str(tmp_path / 'deep'))
    learning.learn(segmenter, found, batches(segmenter), 1)
    learning.save(found[0], 1, 'a teacher')
    assert found[0].target == str(tmp_path / 'deep' / 'loss_maskd.pth')
    loss = build(dict(type='MasKDLoss', tokens=found[0].target, num_tokens=4))
    x = torch.randn(2, 19, 4, 4)
    loss.prepare((x, ), (x, ))
    assert torch.equal(loss.finder.levels[0].masks(x), found[0].learner.levels[0].masks(x))


def test_problems_are_named_before_anything_runs(segmenter):
    with pytest.raises(ValueError, match='no loss of this config learns.*loss_kd'):
        lessons(loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg'))
    with pytest.raises(ValueError, match='is no file to write(.|\n)*num_tokens'):
        lessons(loss_a=maskd('a', tokens=None), loss_b=maskd('b', num_tokens=0))
    shared = lessons(loss_b=maskd('b'), loss_a=maskd('a'))
    assert [lesson.name for lesson in shared] == ['loss_a']
    with pytest.raises(ValueError, match='loss_b: .* is the file of loss_a too, which is a MasKDLoss'):
        lessons(loss_a=maskd('a'), loss_b=dict(maskd('b'), type='FreeKDLoss'))
    twice = lessons(loss_a=maskd('decode_head.conv_seg'), loss_b=maskd('decode_head.conv_seg', tokens='b.pth'))
    with pytest.raises(ValueError, match='loss_b and loss_a both change'):
        learning.learn(segmenter, twice, batches(segmenter), 1)
    with pytest.raises(KeyError, match='teacher has no module'):
        learning.learn(segmenter, lessons(loss_a=maskd('neck')), batches(segmenter), 1)
    with pytest.raises(ValueError, match='data are empty'):
        learning.learn(segmenter, lessons(loss_a=maskd('decode_head.conv_seg')), [], 1)


def test_an_auto_encoder_needs_no_task_and_stops_the_teacher_at_its_tap(segmenter):
    found = lessons(loss_ktaad=dict(type='KTAADLoss', at='decode_head.convs', autoencoder='unused.pth', code=8))
    seen, calls = [], []
    handle = segmenter.decode_head.conv_seg.register_forward_hook(lambda *args: calls.append(1))
    try:
        learning.learn(segmenter, found, batches(segmenter), 41, 0.01, lambda *args: seen.append(args))
    finally:
        handle.remove()
    assert not calls[1:]  # the first pass looks at everything once
    assert list(seen[0][2]) == ['loss_ktaad'] and seen[-1][2]['loss_ktaad'] < 0.8 * seen[0][2]['loss_ktaad']
