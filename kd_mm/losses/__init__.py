"""Distillation losses, one file a method."""

from kd_mm.losses.base import KDLoss
from kd_mm.losses.bckd import BCKDLoss
from kd_mm.losses.crosskd import CrossKDLoss
from kd_mm.losses.cwd import CWDLoss
from kd_mm.losses.fgd import FGDLoss
from kd_mm.losses.fitnet import FitNetLoss
from kd_mm.losses.kd import SoftmaxKDLoss
from kd_mm.losses.ld import LDLoss
from kd_mm.losses.mgd import MGDLoss
from kd_mm.losses.pkd import PKDLoss
from kd_mm.losses.rm import RMLoss
from kd_mm.losses.sigmoid_kd import SigmoidKDLoss

__all__ = [
    'BCKDLoss', 'CWDLoss', 'CrossKDLoss', 'FGDLoss', 'FitNetLoss', 'KDLoss', 'LDLoss', 'MGDLoss', 'PKDLoss',
    'RMLoss', 'SigmoidKDLoss', 'SoftmaxKDLoss']
