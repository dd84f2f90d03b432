"""Distillation losses, one file a method."""

from kd_mm.losses.at import ATLoss
from kd_mm.losses.base import KDLoss
from kd_mm.losses.cwd import CWDLoss
from kd_mm.losses.dist import DISTLoss
from kd_mm.losses.dkd import DKDLoss
from kd_mm.losses.fgd import FGDLoss
from kd_mm.losses.fitnet import FitNetLoss
from kd_mm.losses.ifvd import IFVDLoss
from kd_mm.losses.kd import SoftmaxKDLoss
from kd_mm.losses.mgd import MGDLoss
from kd_mm.losses.pkd import PKDLoss
from kd_mm.losses.sigmoid_kd import SigmoidKDLoss
from kd_mm.losses.skd_pairwise import SKDPairwiseLoss

__all__ = ['ATLoss', 'CWDLoss', 'DISTLoss', 'DKDLoss', 'FGDLoss', 'FitNetLoss', 'IFVDLoss', 'KDLoss', 'MGDLoss',
           'PKDLoss', 'SKDPairwiseLoss', 'SigmoidKDLoss', 'SoftmaxKDLoss']
