"""tools/export_student.py: the plain student of a distilled checkpoint."""

import importlib.util
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from stock import detector, hook, retinanet_model, teacher_of, train

from kd_mm.hosts.checkpoint import load_file

SPEC = importlib.util.spec_from_file_location(
    'kd_mm_tool_export', Path(__file__).parent.parent.parent / 'tools' / 'export_student.py')
EXPORT = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(EXPORT)


@pytest.fixture(scope='module')
def run(coco_root, tmp_path_factory):
    """A checkpoint of two steps with a wider teacher (so with adapters) and an EMA; its config, on disk, too."""
    folder = tmp_path_factory.mktemp('export')
    cfg = detector(coco_root, folder / 'run')
    teacher = teacher_of(cfg, **retinanet_model(base=12, neck=24))
    plain = folder / 'plain.py'
    cfg.dump(str(plain))
    cfg.custom_hooks = [dict(type='EMAHook'),
                        hook(teacher, dict(loss_cwd=dict(type='CWDLoss', at='neck', loss_weight=3.0)))]
    train(cfg, cfg.custom_hooks)
    return dict(cfg=cfg, plain=plain, checkpoint=folder / 'run' / 'iter_2.pth', folder=folder)


def test_export_keeps_the_student_and_drops_the_rest(run, tmp_path, capsys):
    source = load_file(str(run['checkpoint']))
    assert source['kd_mm']['state_dict'] and 'optimizer' in source and 'ema_state_dict' in source
    out = tmp_path / 'student.pth'
    EXPORT.main([str(run['checkpoint']), str(out)])
    text = capsys.readouterr().out
    assert 'loads strictly into RetinaNet' in text and 'kd_mm' in text

    # Plain torch with safe loading, plain mmdet, strict.
    exported = torch.load(out, weights_only=True)
    assert sorted(exported) == ['meta', 'state_dict']
    assert exported['meta']['dataset_meta']['classes'] == source['meta']['dataset_meta']['classes']
    assert all(torch.equal(value, source['state_dict'][key]) for key, value in exported['state_dict'].items())
    cfg = Config.fromstring(exported['meta']['cfg'], '.py')
    assert [item['type'] for item in cfg.custom_hooks] == ['EMAHook'] and 'kd_mm' not in exported['meta']['cfg']
    with DefaultScope.overwrite_default_scope('mmdet'):
        load_checkpoint(MODELS.build(cfg.model), str(out), strict=True)
    assert out.stat().st_size < run['checkpoint'].stat().st_size / 2


def test_export_with_a_config_file(run, tmp_path):
    out = tmp_path / 'student.pth'
    EXPORT.main([str(run['checkpoint']), str(out), '--config', str(run['plain'])])
    assert out.is_file()


def test_nothing_is_overwritten_unasked(run, tmp_path):
    out = tmp_path / 'student.pth'
    out.write_text('precious')
    arguments = [str(run['checkpoint']), str(out)]
    with pytest.raises(SystemExit, match='exists.*--overwrite'):
        EXPORT.main(arguments)
    assert out.read_text() == 'precious'
    EXPORT.main([*arguments, '--force'])
    assert load_file(str(out))['state_dict']
    with pytest.raises(SystemExit, match='checkpoint itself'):
        EXPORT.main([str(run['checkpoint']), str(run['checkpoint']), '--force'])


def test_failures_leave_no_file(run, tmp_path):
    """A config of another architecture, a missing file, a file that is no checkpoint, a missing folder."""
    other = Config.fromfile(str(run['plain']))
    other.merge_from_dict(dict(model=retinanet_model(neck=32)))
    wrong = tmp_path / 'wrong.py'
    other.dump(str(wrong))
    junk = tmp_path / 'junk.pth'
    junk.write_bytes(b'no checkpoint')
    bare = tmp_path / 'bare.pth'
    torch.save(dict(state_dict=load_file(str(run['checkpoint']))['state_dict']), bare)
    checkpoint, out = str(run['checkpoint']), tmp_path / 'out.pth'
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, text in (
            ([checkpoint, out, '--config', wrong], 'of another shape.*--config'),
            ([checkpoint, out, '--config', 'no.py'], 'no such config'),
            (['no.pth', out], 'no such checkpoint'),
            ([junk, out], 'cannot be loaded'),
            ([bare, out], 'stores no config.*--config'),
            ([checkpoint, tmp_path / 'no' / 'out.pth'], 'no such folder')):
        with pytest.raises(SystemExit, match=text):
            EXPORT.main([str(argument) for argument in arguments])
    assert sorted(path.name for path in tmp_path.iterdir()) == before
