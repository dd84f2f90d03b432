"""tools/studies/against_mmdeploy.py: what it says without mmdeploy; with it, that its table is true."""

import sys
from pathlib import Path

import pytest
from conftest import write_coco

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / 'tools' / 'studies')]
import against_mmdeploy  # noqa: E402
import others  # noqa: E402

from kd_mm.hosts.packages import installed  # noqa: E402

THERE = all(map(installed, against_mmdeploy.PACKAGES))


def test_without_mmdeploy_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmdeploy', None)  # neither found nor imported
    with pytest.raises(SystemExit, match=r'mmdeploy.* not installed\..*pip install --no-deps mmdeploy==1\.3\.1'):
        against_mmdeploy.main(['--images', str(tmp_path)])


def test_every_missing_package_is_named():
    with pytest.raises(SystemExit, match='study: no_such_a, no_such_b are not installed. Get them'):
        others.need('study', ('torch', 'no_such_a', 'no_such_b'), 'Get them')
    with pytest.raises(SystemExit, match='study: no_such_a is not installed'):
        others.need('study', ('no_such_a', ), '')
    others.need('study', ('torch', ), '')


@pytest.mark.parametrize('arguments, message', [
    (['--shape', '100', '320'], 'multiples of 32'), (['--count', '0'], 'at least 1')])
def test_bad_arguments(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        against_mmdeploy.main(['--images', str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not THERE, reason='mmdeploy is not installed')
def test_the_same_boxes(tmp_path, monkeypatch, capsys):
    write_coco(tmp_path)
    with pytest.raises(SystemExit, match='against_mmdeploy: no such folder of pictures'):
        against_mmdeploy.main(['--images', str(tmp_path / 'none')])
    arguments = ['--images', str(tmp_path / 'images'), '--count', '2', '--shape', '64', '96']
    assert against_mmdeploy.main(arguments) == 0
    row = [cell.strip() for cell in capsys.readouterr().out.strip().splitlines()[-1].strip('|').split('|')]
    assert row[0] == '2' and row[1] == row[2] == row[3] != '0' and row[4] == '0'
    # Boxes that one side drops are found.
    own = against_mmdeploy.Deployed.__call__

    def fewer(self, data):
        found, = own(self, data)
        found.pred_instances = found.pred_instances[3:]
        return [found]

    monkeypatch.setattr(against_mmdeploy.Deployed, '__call__', fewer)
    assert against_mmdeploy.main(arguments) == 1
    assert 'torch alone finds one' in capsys.readouterr().out
