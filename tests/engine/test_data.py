"""Data as users have it: every layout and wrapper of the hosts trains with distillation, or says why not."""

import pytest
import torch
from layout_runs import det_config, distilled, same_pictures
from layouts import DETECTION


@pytest.mark.parametrize('name', DETECTION)
def test_detection_layouts(name, tmp_path):
    layout = DETECTION[name](tmp_path / 'data')
    run = distilled(det_config(layout, tmp_path / 'work'), score_teacher=True)
    assert tuple(run.distiller.classes) == layout.classes and same_pictures(run)
    assert layout.metric in run.hook.scores.found['teacher']
    assert layout.metric.split('/')[-1] in str(run.runner.message_hub.log_scalars.keys())
    saved = torch.load(tmp_path / 'work' / 'iter_2.pth', weights_only=False)
    assert saved['state_dict'].keys() == run.runner.model.state_dict().keys()
