"""``kd-mm compare``: groups by config and seed, means, and no difference where none is shown."""

import json

import pytest
from pairs import kd_mm, message
from scipy import stats

from kd_mm.lab.commands.compare import Group, difference, read_run, verdict


def run(folder, score, seed=0, metric='mIoU', lr=0.1):
    """A work dir as the host leaves it."""
    data = folder / '20260101_000000' / 'vis_data'
    data.mkdir(parents=True)
    data.joinpath('config.py').write_text(f'randomness = dict(seed={seed})\nwork_dir = {str(folder)!r}\nlr = {lr}\n')
    lines = [dict(loss=1.0, step=1), {metric: score - 1, 'step': 1}, dict(loss=0.5, step=2), {metric: score, 'step': 2}]
    data.joinpath('scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    return folder


def test_groups_are_made_by_the_config_and_paired_by_the_seed(tmp_path):
    plain = [run(tmp_path / f'plain{seed}', 60 + 3 * seed, seed) for seed in range(3)]
    taught = [run(tmp_path / f'kd{seed}', 62.1 - 0.1 * seed + 3 * seed, seed, lr=0.2) for seed in range(3)]
    result = kd_mm('compare', *plain, *taught)
    assert result.exit_code == 0, message(result)
    assert '63 ± 3' in result.output and '65 ± 2.9' in result.output and '0, 1, 2' in result.output
    assert '+2 ± 0.25 (paired by seed)' in result.output and 'better' in result.output
    assert 'mIoU' in result.output


def test_names_and_other_seeds(tmp_path):
    first = [f'a={run(tmp_path / f"a{seed}", score, seed)}' for seed, score in enumerate((60.0, 63.0))]
    second = [f'b={run(tmp_path / f"b{seed}", score, seed + 5)}' for seed, score in enumerate((61.0, 64.0))]
    result = kd_mm('compare', *first, *second)
    assert 'no difference shown' in result.output and '(not paired)' in result.output
    assert 'one run: nothing is shown' in kd_mm('compare', first[0], second[0]).output


def test_a_work_dir_of_distill_has_two(tmp_path):
    runs = []
    for seed in (0, 1):
        folder = tmp_path / f'run{seed}'
        for name, lr in (('baseline', 0.1), ('distilled', 0.2)):
            run(folder / name, 0, seed, lr=lr)
        results = dict(baseline=dict(metrics=dict(mIoU=50.0 + seed)), distilled=dict(metrics=dict(mIoU=53.0 + seed)))
        (folder / 'distill.json').write_text(json.dumps(dict(what=dict(recipe='cwd'), results=results)))
        runs.append(folder)
    result = kd_mm('compare', *runs)
    assert 'plain student' in result.output and 'cwd' in result.output and '+3 ± 0 (paired by seed)' in result.output
    assert 'better' in result.output


def test_a_part_of_distill_that_was_scored_by_itself(tmp_path):
    """A training that was continued after its last step has no validation in its own logs."""
    for name, score in (('baseline', 50.0), ('distilled', 53.0)):
        log = run(tmp_path / name, 0, lr=score) / '20260101_000000' / 'vis_data' / 'scalars.json'
        log.write_text(json.dumps(dict(loss=1.0, step=1)))
        run(tmp_path / name / 'evaluation', score)
    result = kd_mm('compare', tmp_path / 'baseline', tmp_path / 'distilled', '--metric', 'mIoU')
    assert result.exit_code == 0 and 'mIoU (0 to 100)' in result.output, message(result)
    assert 'baseline' in result.output and 'distilled' in result.output
    found, = read_run(str(tmp_path / 'distilled'), None)
    assert found[3] == dict(mIoU=53.0)


@pytest.mark.parametrize('one, two', [([1.0, 2.0, 4.0], [2.0, 2.5, 5.5]), ([1.0, 2.0], [5.0, 5.5, 9.0])])
def test_the_interval_is_that_of_the_library(one, two):
    paired = len(one) == len(two)
    first, second = (Group('x', [(seed if paired else seed + 10 * index, value) for seed, value in enumerate(values)])
                     for index, values in enumerate((one, two)))
    mean, half, way = difference(first, second)
    expected = (stats.ttest_rel(two, one) if paired else stats.ttest_ind(two, one, equal_var=False)
                ).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert way == ('paired by seed' if paired else 'not paired')


def test_verdicts():
    assert [verdict(*pair) for pair in ((1.0, 2.0), (3.0, 2.0), (-3.0, 2.0), (1.0, None), (0.0, 0.0))] == [
        'no difference shown', 'better', 'worse', 'one run: nothing is shown', 'no difference shown']


def test_a_log_that_was_cut_off(tmp_path):
    """The machine went down while a row was written; the run was resumed, which makes a log of its own."""
    folder = run(tmp_path / 'run', 60.0)
    log = folder / '20260101_000000' / 'vis_data' / 'scalars.json'
    log.write_text(log.read_text() + '\n{"mIoU": 61.')
    assert '60' in kd_mm('compare', folder).output
    later = run(folder / 'later', 63.0) / '20260101_000000'
    later.rename(folder / '20260102_000000')
    assert '63' in kd_mm('compare', folder).output


def test_a_score_that_is_no_number_is_no_verdict():
    assert verdict(float('nan'), 1.0) == verdict(float('nan'), float('nan')) == 'a score is no number'


def test_what_is_no_run(tmp_path):
    assert 'no such run: ' in message(kd_mm('compare', tmp_path / 'gone'))
    assert 'no evaluation in its logs' in message(kd_mm('compare', tmp_path))
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'labels.json').write_text('[\n  1,\n  2\n]')  # of something else
    assert 'no evaluation in its logs' in message(kd_mm('compare', tmp_path))
    (tmp_path / 'distill.json').write_text(json.dumps(dict(what={}, results={})))
    assert 'has no scores yet' in message(kd_mm('compare', tmp_path))
    first = run(tmp_path / 'one', 1.0)
    other = run(tmp_path / 'two', 1.0, metric='coco/bbox_mAP')
    assert 'no metric in common' in message(kd_mm('compare', first, other))
    result = kd_mm('compare', first, '--metric', 'aAcc')
    assert result.exit_code == 1 and "has no 'aAcc'; it has mIoU" in message(result)
    assert 'the same folder as' in message(kd_mm('compare', first, f'again={first}/../one'))
    assert 'write NAME=RUN' in message(kd_mm('compare', first, 'plain='))
