"""Which map tokens make, said in a loss's config and judged before the first step, on a narrowed SegFormer."""

import pytest
import torch
from mmengine.config import Config
from stock import loss_step
from torch import nn

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.term import Term, mirrored
from kd_mm.hosts.models import build_model
from kd_mm.hosts.zoo import zoo_config
from kd_mm.ops.problems import ConfigProblems

AT = 'backbone.layers.1.1.0'  # stride 8


class Turned(nn.Module):
    """A block that hands its sequence length on as a second pair of numbers, H and W exchanged."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, hw_shape):
        return self.inside(x, hw_shape, hw_shape[::-1])

    def inside(self, x, hw_shape, window):
        return self.block(x, hw_shape)


@pytest.fixture(scope='module')
def cfg():
    cfg = Config.fromfile(str(zoo_config('mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py')))
    cfg.model.backbone.update(init_cfg=None, embed_dims=8, num_heads=[1, 2, 5, 8], num_layers=[1, 1, 1, 1])
    cfg.model.decode_head.update(in_channels=[8, 16, 40, 64], channels=16, norm_cfg=dict(type='BN'))
    return cfg


@pytest.fixture
def student(cfg):
    torch.manual_seed(0)
    return build_model(cfg, 'mmseg')


def turned(model):
    model.backbone.layers[1][1][0] = Turned(model.backbone.layers[1][1][0])
    return model


def distil(cfg, student, **loss):
    return Distiller(student, dict(model=cfg.model.to_dict(), default_scope='mmseg'),
                     dict(loss_kd=dict(dict(type='FitNetLoss'), **loss)), teacher_ckpt='random', scope='mmseg')


def test_what_was_taken_is_noted_before_the_first_step(cfg, student):
    kd = distil(cfg, student, at=AT)
    note = kd.current.taps['student', AT].token_size_note
    assert note == f"student {AT!r}: 256 tokens are a map of 16x16 (named by its call)"


def test_an_ambiguous_guess_is_a_problem_before_the_first_step(cfg, student):
    """On the square images of the dry pass both pairs are the same; the problem is found nevertheless."""
    path = AT + '.inside'
    with pytest.raises(ConfigProblems, match=f"student: the tap {path!r} gives 512 tokens, and their map could be "
                                             '16x32 or 32x16.*tokens=STRIDE') as error:
        distil(cfg, turned(student), student_at=path, teacher_at=AT)
    assert [problem[:8] for problem in error.value.found] == ['student:']  # once, and no list of the sizes tried


def test_the_stride_in_the_config_settles_it(cfg, student):
    path = AT + '.inside'
    kd = distil(cfg, turned(student), student_at=path, teacher_at=AT, tokens=dict(student=8))
    assert 'tokens=8' in kd.current.taps['student', path].token_size_note
    assert [tap.tokens for (name, _), tap in kd.current.taps.items() if name != 'student'] == [None]
    for shape in ((64, 64), (64, 128)):
        assert loss_step(student, kd, shape)['loss_kd'] > 0


def test_cells_in_the_config(cfg, student):
    kd = distil(cfg, student, at=AT, tokens=[8, 32])
    assert kd.current.taps['student', AT].token_size_note.endswith('256 tokens are a map of 8x32 (tokens=(8, 32))')
    with pytest.raises(ConfigProblems, match=r'256 tokens of an input of 128x128, and tokens=\(9, 9\)'):
        distil(cfg, student, at=AT, tokens=(9, 9))


def test_two_losses_must_agree(cfg, student):
    losses = dict(loss_a=dict(type='FitNetLoss', at=AT, tokens=8), loss_b=dict(type='FitNetLoss', at=AT),
                  loss_c=dict(type='FitNetLoss', at=AT, tokens=4))
    teacher = dict(model=cfg.model.to_dict(), default_scope='mmseg')
    with pytest.raises(ConfigProblems, match='loss_c: tokens=4 at the tap .* another loss says tokens=8'):
        Distiller(student, teacher, losses, teacher_ckpt='random', scope='mmseg')
    losses.pop('loss_c')
    built = Distiller(student, teacher, losses, teacher_ckpt='random', scope='mmseg')
    assert built.current.taps['student', AT].tokens == 8


def test_the_key_of_a_loss():
    assert Term('loss_a', dict(type='FitNetLoss', at='x')).tokens == dict(student=None, teacher=None)
    assert Term('loss_a', dict(type='FitNetLoss', at='x', tokens=(4, 8))).tokens == dict(student=(4, 8), teacher=(4, 8))
    for wrong in (0, (4, ), 8.0, dict(student='x'), (4, -1)):
        with pytest.raises(ValueError, match='loss_a: tokens=.* must be .H, W.'):
            Term('loss_a', dict(type='FitNetLoss', at='x', tokens=wrong))
    with pytest.raises(ValueError, match="FitNetLoss got unknown argument.*'tokens'"):
        Term('loss_a', dict(type='FitNetLoss', at='x', tokens='a file'))
    with pytest.raises(ValueError, match='compares one head with one: remove tokens'):
        Term('loss_a', dict(type='LDLoss', at='bbox_head', tokens=8))
    swapped = mirrored(dict(type='FitNetLoss', at='x', tokens=dict(student=8), levels=dict(teacher=[1])))
    assert swapped['tokens'] == dict(student=None, teacher=8) and swapped['levels'] == dict(student=[1], teacher=None)


def test_a_loss_with_tokens_of_its_own_keeps_them():
    term = Term('loss_a', dict(type='MasKDLoss', at='x', tokens='random', num_tokens=4))
    assert term.tokens == dict(student=None, teacher=None) and term.loss.num_tokens == 4
    rows = [torch.zeros(4, 3, 8), torch.zeros(4, 3, 8)]
    assert Term('loss_a', dict(type='FreeKDLoss', at='x', tokens=rows)).loss.num_tokens == 3
