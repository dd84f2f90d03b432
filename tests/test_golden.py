"""The golden vectors, through the code of ``tools/check_golden.py``, and that this code can fail."""

import fnmatch
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent
SPEC = importlib.util.spec_from_file_location('check_golden', ROOT.parent / 'tools' / 'check_golden.py')
check_golden = importlib.util.module_from_spec(SPEC)
sys.modules['check_golden'] = check_golden  # dataclasses look their module up there
SPEC.loader.exec_module(check_golden)

import recipes.cwd  # noqa: E402  check_golden made it importable
from recipes.vector import RECIPES, find_recipe  # noqa: E402

FILES = sorted(path.relative_to(ROOT / 'golden').with_suffix('').as_posix()
               for path in (ROOT / 'golden').rglob('*.npz'))


@pytest.mark.parametrize('name', FILES)
def test_vector(name):
    report = check_golden.check_file(ROOT / 'golden' / f'{name}.npz')
    assert report.status == 'ok', report.problems
    # A table of weights has no gradient.
    kinds = ('loss', ) if name == 'det/gam' else ('loss', 'gradients')
    assert report.compared >= len(kinds) + 1
    assert all(report.errors[kind] <= 1e-9 for kind in kinds)


def test_every_file_has_a_recipe_and_every_recipe_a_file():
    assert all(find_recipe(Path(name).stem) for name in FILES)
    stems = [Path(name).stem for name in FILES]
    lost = [pattern for pattern in RECIPES if not fnmatch.filter(stems, pattern)]
    # A stub of tools/dev/new_method.py has no file until its author records one.
    assert [pattern for pattern in lost if 'FILL IN' not in (RECIPES[pattern].__doc__ or '')] == []


@pytest.fixture
def copy(tmp_path):
    """Copies a vector with some arrays changed."""

    def make(name, **changes):
        with np.load(ROOT / 'golden' / f'{name}.npz') as archive:
            arrays = {key: archive[key] for key in archive.files}
        for key, change in changes.items():
            arrays[key] = change(arrays[key]) if key in arrays else change(None)
        path = tmp_path / f'{Path(name).stem}.npz'
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
        return path

    return make


@pytest.mark.parametrize('name, key', [
    ('det/fgd', 'loss'), ('det/fgd', 'loss_rela_1'), ('det/fgd', 'gradnorm_param_0_conv_mask_t_weight'),
    ('det/fgd', 'grad_student_1'), ('det/fgd', 'variant_padded_frame_loss'), ('det/fgd', 'param_1_align_weight'),
    ('det/fgd', 'gt_bboxes_1'), ('det/mgd', 'mask_0'), ('det/pkd', 'loss_level_2'), ('det/kl', 'variant_2d_none_loss'),
    ('seg/cwd_cirkd_feat', 'grad_param_align_weight'), ('seg/pixel_kd_skd', 'ext_loss_ignore_masked'),
    ('seg/pixel_kd_cirkd_t1', 'gt_seg_map'), ('det/sigmoid_kd_bckd', 'label_weights_0'),
])


def test_a_wrong_number_fails(copy, name, key):
    change = (lambda a: 1 - a) if 'mask' in key and 'param' not in key or 'label_weights' in key else (
        lambda a: np.full_like(a, 255)) if key == 'gt_seg_map' else (lambda a: a * (1 + 1e-6) + (key == 'gt_bboxes_1'))
    path = copy(name, **{key: change})
    report = check_golden.check_file(path)
    assert report.status == 'off' and report.problems
    assert check_golden.main([str(path.parent)]) == 1


def test_hyper_parameters_come_from_the_file(copy):
    def other_tau(meta):
        content = json.loads(str(meta))
        content['hyper_parameters']['tau'] = 2.0
        return np.array(json.dumps(content))

    assert check_golden.check_file(copy('seg/cwd_mmrazor_tau', meta=other_tau)).status == 'off'


def test_nan_is_off(copy):
    report = check_golden.check_file(copy('det/pkd', loss=lambda a: a * np.nan))
    assert report.status == 'off'


def test_a_number_that_no_recipe_compares_fails(copy):
    report = check_golden.check_file(copy('det/pkd', variant_new_loss=lambda _: np.array(1.0)))
    assert report.status == 'off' and 'variant_new_loss' in report.problems[0]


def test_a_file_without_expected_numbers_fails(copy):
    keys = ['loss', 'grad_student_0', 'loss_identical']
    report = check_golden.check_file(copy('seg/cwd_mmrazor_tau', **dict.fromkeys(keys, lambda _: None)))
    assert report.status == 'off'


def test_a_broken_file_fails(tmp_path):
    (tmp_path / 'pkd.npz').write_bytes(b'nothing')
    assert check_golden.check_file(tmp_path / 'pkd.npz').status == 'off'


def test_exit_status(tmp_path, copy, capsys):
    shutil.copy(ROOT / 'golden' / 'det' / 'kl.npz', tmp_path)
    assert check_golden.main([str(tmp_path)]) == 0
    shutil.copy(ROOT / 'golden' / 'det' / 'kl.npz', tmp_path / 'someone_elses.npz')
    assert check_golden.main([str(tmp_path)]) == 2
    assert 'no implementation' in capsys.readouterr().out
    assert check_golden.main([str(tmp_path), '--only', 'kl']) == 0
    copy('det/pkd', loss=lambda a: a * 1.001)
    assert check_golden.main([str(tmp_path)]) == 1


def test_a_missing_file_fails(tmp_path):
    assert check_golden.check_file(tmp_path / 'fgd.npz').status == 'off'
    assert check_golden.main([str(tmp_path)]) == 1
    assert check_golden.main([str(tmp_path / 'nowhere')]) == 1
    assert check_golden.main([str(ROOT / 'golden'), '--only', 'nothing']) == 1


def test_the_longest_pattern_wins():
    assert find_recipe('cwd') is recipes.cwd.cwd
    assert find_recipe('cwd_norm') is recipes.cwd.cwd_norm
    assert find_recipe('cwd_unknown') is None
