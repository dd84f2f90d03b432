"""What the log of a real training says about the terms."""

import json
from pathlib import Path

import pytest
from stock import detector, hook, teacher_of, train

PARTS = ('fg', 'bg', 'mask', 'rela')


@pytest.fixture
def det(coco_root, tmp_path):
    return detector(coco_root, tmp_path / 'work')


def test_the_parts_of_a_term_are_logged_and_counted_once(det):
    """FGD: `loss_fgd` is the sum of its four parts, and the host's total holds it once."""
    losses = dict(loss_fgd=dict(type='FGDLoss', at='neck', loss_weight=2.0), loss_pkd=dict(type='PKDLoss', at='neck'))
    runner, record = train(det, [hook(teacher_of(det), losses)])
    step = record.losses[-1]
    parts = {part: float(runner.message_hub.get_scalar(f'train/loss_fgd/{part}').current()) for part in PARTS}
    assert all(value > 0 for name, value in parts.items())
    assert sum(parts.values()) == pytest.approx(step['loss_fgd'], rel=1e-5)
    terms = [value for name, value in step.items() if name.startswith('loss_')]
    assert len(terms) == 4 and step['loss'] == pytest.approx(sum(terms), rel=1e-5)
    assert not [name for name in step if '/' in name]  # what the host sums
    assert not [name for name in runner.message_hub.log_scalars if name.startswith('train/loss_pkd/')]

    line = next(Path(det.work_dir).glob('*/vis_data/scalars.json')).read_text().splitlines()[-1]
    written = json.loads(line)
    assert sum(written[f'loss_fgd/{part}'] for part in PARTS) == pytest.approx(written['loss_fgd'], rel=1e-4)


def test_a_factor_of_a_part_moves_that_part_alone(det):
    found = []
    for gamma in (5e-4, 1e-3):
        runner, _ = train(det, [hook(teacher_of(det), dict(loss_fgd=dict(type='FGDLoss', at='neck', gamma=gamma)))])
        found.append({part: float(runner.message_hub.get_scalar(f'train/loss_fgd/{part}').data[0][0])
                      for part in PARTS})
    first, second = found
    assert second['mask'] == pytest.approx(2 * first['mask'], rel=1e-5)
    assert all(second[part] == pytest.approx(first[part], rel=1e-5) for part in PARTS if part != 'mask')
