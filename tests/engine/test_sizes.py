"""Losses whose authors average-pool, on real segmentors of different strides."""

import pytest
from stock import distill_hook, hook, segmentor, teacher_of, train

CONNECTOR = dict(type='ConvAdapter', bias=False, always=True, norm=True)
HIDDEN = 'decode_head.conv_cat'
LOSSES = dict(
    loss_at=dict(type='ATLoss', at=HIDDEN), loss_nst=dict(type='NSTLoss', at=HIDDEN),
    loss_vid=dict(type='VIDLoss', at=HIDDEN), loss_ofd=dict(type='OFDLoss', at=f'{HIDDEN}.bn', adapter=CONNECTOR),
    loss_auto=dict(type='OFDLoss', at=f'{HIDDEN}.bn'),
    loss_resized=dict(type='NSTLoss', at=HIDDEN, adapter=dict(type='ResizeAdapter')))


@pytest.mark.parametrize('larger', ['teacher', 'student'])
def test_segmentors_of_different_stride(cityscapes_root, tmp_path, larger):
    cfg = segmentor(cityscapes_root, tmp_path)
    teacher = teacher_of(cfg, decode_head=dict(channels=12))
    model = teacher['model'] if larger == 'teacher' else cfg.model
    model['backbone']['strides'] = (1, 1, 1, 1)
    runner, record = train(cfg, [hook(teacher, LOSSES)])
    assert len(record.losses) == 2
    for name in LOSSES:
        assert all(step[name] == step[name] and abs(step[name]) < 1e6 for step in record.losses), name
    found = {name: type(term.adapter).__name__ for name, term in distill_hook(runner).distiller.terms.items()}
    assert found == dict(loss_at='NoneType', loss_nst='NoneType', loss_vid='NoneType', loss_ofd='ConvAdapter',
                         loss_auto='ConvAdapter', loss_resized='ResizeAdapter')
    if larger == 'teacher':  # to half of a size, bilinear is the average
        assert record.losses[0]['loss_nst'] != pytest.approx(record.losses[0]['loss_resized'], rel=1e-3)
