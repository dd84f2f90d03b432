"""Distillation losses, one file a method."""

from kd_mm.losses.af_dcd import AfDCDLoss
from kd_mm.losses.base import KDLoss
from kd_mm.losses.cirkd import CIRKDMemoryLoss, CIRKDMiniBatchLoss
from kd_mm.losses.cirkd_v2 import CIRKDChannelLoss
from kd_mm.losses.cwd import CWDLoss
from kd_mm.losses.fgd import FGDLoss
from kd_mm.losses.fitnet import FitNetLoss
from kd_mm.losses.kd import SoftmaxKDLoss
from kd_mm.losses.ktaad import KTAADLoss
from kd_mm.losses.learned import Learner
from kd_mm.losses.maskd import MasKDLoss
from kd_mm.losses.mgd import MGDLoss
from kd_mm.losses.pkd import PKDLoss
from kd_mm.losses.sigmoid_kd import SigmoidKDLoss
from kd_mm.losses.transkd import TransKDLoss

__all__ = [
    'AfDCDLoss',
    'CIRKDChannelLoss',
    'CIRKDMemoryLoss',
    'CIRKDMiniBatchLoss',
    'CWDLoss',
    'FGDLoss',
    'FitNetLoss',
    'KDLoss',
    'KTAADLoss',
    'Learner',
    'MGDLoss',
    'MasKDLoss',
    'PKDLoss',
    'SigmoidKDLoss',
    'SoftmaxKDLoss',
    'TransKDLoss',
]
