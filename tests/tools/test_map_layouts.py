"""The measurements behind the rules of layout: all forms of a table are one function, and the table has their times."""

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tools' / 'studies'))
import map_layouts  # noqa: E402


@pytest.mark.parametrize('name', list(map_layouts.STUDIES))
def test_the_forms_of_a_table_are_one_function(name, monkeypatch, capsys):
    compared, original = [], map_layouts.drawn

    def best(forms, turns):
        first, second = (form() for form in forms.values())
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
        compared.append(name)
        return dict.fromkeys(forms, 2.0)

    monkeypatch.setattr(map_layouts, 'best', best)
    monkeypatch.setattr(map_layouts, 'drawn', lambda images, channels, *edges: original(images, channels, 8, 4))
    monkeypatch.setattr(map_layouts.sampling, 'QUERIES', map_layouts.sampling.QUERIES)  # put back: the study sets it
    assert map_layouts.main(['--only', name, '--turns', '1']) == 0
    rows = re.findall(r'^.{44} .* 2\.00, .* 2\.00; .* 1\.00$', capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == len(compared) > 3


def test_times_are_the_least_of_the_turns(monkeypatch):
    clock = iter([0, 9, 9, 10, 10, 13, 13, 15])  # seconds: the first turn does not count
    monkeypatch.setattr(map_layouts.time, 'process_time', lambda: next(clock))
    assert map_layouts.best(dict(one=lambda: None), 3) == dict(one=1000)
