"""Regions: where to imitate."""

from kd_mm.regions.base import RegionMask
from kd_mm.regions.edge import EdgeRegion
from kd_mm.regions.fine_grained import FineGrainedRegion
from kd_mm.regions.gaussian import GaussianBoxRegion
from kd_mm.regions.gt_box import GTBoxRegion
from kd_mm.regions.gt_mask import GTMaskRegion
from kd_mm.regions.level_box import LevelBoxRegion
from kd_mm.regions.prediction_gap import PredictionGapRegion
from kd_mm.regions.seg_class import SegClassRegion
from kd_mm.regions.teacher_score import TeacherScoreRegion

__all__ = [
    'EdgeRegion',
    'FineGrainedRegion',
    'GTBoxRegion',
    'GTMaskRegion',
    'GaussianBoxRegion',
    'LevelBoxRegion',
    'PredictionGapRegion',
    'RegionMask',
    'SegClassRegion',
    'TeacherScoreRegion',
]
