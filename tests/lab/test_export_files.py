"""What `kd-mm export` writes over, and what it refuses before it has written anything."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from stock import NARROW_FCN
from two_stage import two_stage_config

from kd_mm.hosts.models import build_model
from kd_mm.lab.commands.export import main

onnx = pytest.importorskip('onnx', reason='ONNX files need onnx: pip install onnx onnxruntime')
pytest.importorskip('onnxruntime', reason='ONNX files need onnxruntime: pip install onnx onnxruntime')
ONNX = ('--size', '64', '64')


def checkpoint(path, cfg):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = build_model(cfg, cfg.default_scope)
    torch.save(dict(meta=dict(cfg=cfg.pretty_text), state_dict=model.state_dict()), path)
    return str(path)


@pytest.fixture
def student(tmp_path):
    return checkpoint(tmp_path / 'student.pth', Config.fromstring(NARROW_FCN, '.py'))


def refused(*words):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return str(caught.value)


def test_names_that_cannot_be_written(student, tmp_path):
    (tmp_path / 'folder').mkdir()
    nowhere = tmp_path / 'no.pth'
    assert 'no such checkpoint' in refused(nowhere, student, '--overwrite')
    for words in ((tmp_path / 'folder', ), ('--onnx', tmp_path / 'folder')):
        assert 'folder is a folder. Give the name of a file' in refused(student, *words, '--overwrite')
    both = tmp_path / 'both'
    assert 'is to be written twice' in refused(student, both, '--onnx', both, *ONNX)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['folder', 'student.pth']


def test_a_folder_without_room(student, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('tempfile.TemporaryFile', full)
    assert 'out.pth cannot be written: [Errno 28] No space left' in refused(student, tmp_path / 'out.pth')


def test_what_was_there_is_kept_when_the_new_one_fails(student, tmp_path, monkeypatch):
    old = tmp_path / 'old.onnx'
    old.write_text('mine')
    monkeypatch.setattr('kd_mm.lab.onnx_run.TOLERANCE', -1.)
    assert 'differs from torch' in refused(student, '--onnx', old, '--overwrite', *ONNX)
    assert old.read_text() == 'mine' and sorted(path.name for path in tmp_path.iterdir()) == ['old.onnx', 'student.pth']


def test_the_file_of_a_second_stage_is_not_written_over_unasked(tmp_path):
    path = checkpoint(tmp_path / 'faster.pth', two_stage_config('faster'))
    mine = tmp_path / 'a.bbox_head.onnx'
    mine.write_text('mine')
    assert 'a.bbox_head.onnx exists' in refused(path, '--onnx', tmp_path / 'a.onnx', *ONNX)
    assert mine.read_text() == 'mine' and not (tmp_path / 'a.onnx').exists()


def test_bad_images_are_told_before_anything_is_written(student, tmp_path):
    images = tmp_path / 'images'
    images.mkdir()
    (images / 'a.jpg').write_bytes(b'no picture')
    out, graph = tmp_path / 'out.pth', tmp_path / 'out.onnx'
    assert 'a.jpg. Remove them or copy them again' in refused(student, out, '--onnx', graph, *ONNX, '--check', images)
    assert 'no such folder of pictures' in refused(student, out, '--onnx', graph, *ONNX, '--check', tmp_path / 'no')
    assert not out.exists() and not graph.exists()


def test_a_size_and_an_opset_that_cannot_be(student, tmp_path, capsys):
    said = refused(student, '--onnx', tmp_path / 'a.onnx', '--size', '-5', '8')
    assert '--size -5 8: height and width must be at least 16. Take --size 16 16' in said
    refused(student, '--onnx', tmp_path / 'a.onnx', *ONNX, '--opset', '1')
    assert '--opset must be within 11 and 20' in capsys.readouterr().err
