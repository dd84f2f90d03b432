"""Distillation losses, one file a method."""

from kd_mm.losses.base import KDLoss
from kd_mm.losses.cwd import CWDLoss
from kd_mm.losses.defeat import DeFeatLoss
from kd_mm.losses.fbkd import FBKDLoss
from kd_mm.losses.fgd import FGDLoss
from kd_mm.losses.fgfi import FGFILoss
from kd_mm.losses.fitnet import FitNetLoss
from kd_mm.losses.freekd import FreeKDLoss
from kd_mm.losses.frs import FRSLoss
from kd_mm.losses.gid import GIDLoss
from kd_mm.losses.icd import ICDLoss
from kd_mm.losses.kd import SoftmaxKDLoss
from kd_mm.losses.mgd import MGDLoss
from kd_mm.losses.mimic import MimicLoss
from kd_mm.losses.ofd import OFDLoss
from kd_mm.losses.pfi import PFILoss
from kd_mm.losses.pkd import PKDLoss
from kd_mm.losses.reviewkd import ReviewKDLoss
from kd_mm.losses.sigmoid_kd import SigmoidKDLoss

__all__ = [
    'CWDLoss', 'DeFeatLoss', 'FBKDLoss', 'FGDLoss', 'FGFILoss', 'FRSLoss', 'FitNetLoss', 'FreeKDLoss', 'GIDLoss',
    'ICDLoss', 'KDLoss', 'MGDLoss', 'MimicLoss', 'OFDLoss', 'PFILoss', 'PKDLoss', 'ReviewKDLoss', 'SigmoidKDLoss',
    'SoftmaxKDLoss'
]
