"""Calibration by hand."""

import numpy as np
import pytest

from kd_mm.lab.report.calibration import counts, reliability


def test_bins_and_edges():
    found = counts(np.array([0.0, 0.1, 0.5, 0.999, 1.0]), np.array([0, 1, 1, 1, 0]), bins=10)
    assert found[0].tolist() == [1, 1, 0, 0, 0, 1, 0, 0, 0, 2]
    assert found[2].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_expected_calibration_error_by_hand():
    """Bin 0.6: 10 with 4 right; bin 0.9: 30 with 27 right."""
    scores = np.array([0.65] * 10 + [0.95] * 30)
    right = np.array([1] * 4 + [0] * 6 + [1] * 27 + [0] * 3)
    found = reliability(counts(scores, right, bins=10))
    assert found['ece'] == pytest.approx(0.25 * (0.65 - 0.4) + 0.75 * (0.95 - 0.9))
    assert found['right'][6] == pytest.approx(0.4) and found['score'][9] == pytest.approx(0.95)
    assert found['right'][0] is None and found['count'][6] == 10


def test_too_low_and_too_high_do_not_cancel():
    right = np.array([1] * 6 + [0] * 4 + [1] * 5 + [0] * 5)
    found = reliability(counts(np.array([0.35] * 10 + [0.75] * 10), right, 10))
    assert found['gap'] == pytest.approx(0) and found['ece'] == pytest.approx(0.25)


def test_nothing_is_nothing():
    found = reliability(counts(np.zeros(0), np.zeros(0), 10))
    assert found['ece'] is None and found['gap'] is None
