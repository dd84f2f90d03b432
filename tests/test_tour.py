"""The notebook of the site runs from top to bottom, in an empty folder."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / 'docs' / 'tour.ipynb'


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip('mmdet')
    monkeypatch.chdir(tmp_path)
    matplotlib.use('Agg')
    names = {}
    for cell in json.loads(NOTEBOOK.read_text())['cells']:
        if cell['cell_type'] == 'code':
            exec(compile(''.join(cell['source']), NOTEBOOK.name, 'exec'), names)
    shown = capsys.readouterr().out
    assert 'loads strictly into GFL' in shown and 'without kd_mm' in shown and 'kd_task_ratio' in shown
    assert 'one run: nothing is shown' in shown and (tmp_path / 'work_dirs' / 'tour' / 'student_plain.pth').is_file()
