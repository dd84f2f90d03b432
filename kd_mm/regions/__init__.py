"""Regions: where to imitate."""

from kd_mm.regions.base import RegionMask
from kd_mm.regions.edge import EdgeRegion
from kd_mm.regions.gt_box import GTBoxRegion
from kd_mm.regions.seg_class import SegClassRegion

__all__ = ['EdgeRegion', 'GTBoxRegion', 'RegionMask', 'SegClassRegion']
