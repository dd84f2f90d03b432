"""Distillation losses, one file a method."""

from kd_mm.losses.ab import ABLoss
from kd_mm.losses.base import KDLoss
from kd_mm.losses.cc import CCLoss
from kd_mm.losses.cwd import CWDLoss
from kd_mm.losses.fgd import FGDLoss
from kd_mm.losses.fitnet import FitNetLoss
from kd_mm.losses.fsp import FSPLoss
from kd_mm.losses.ft import FTLoss
from kd_mm.losses.kd import SoftmaxKDLoss
from kd_mm.losses.mgd import MGDLoss
from kd_mm.losses.nst import NSTLoss
from kd_mm.losses.pkd import PKDLoss
from kd_mm.losses.pkt import PKTLoss
from kd_mm.losses.rkd import RKDLoss
from kd_mm.losses.sigmoid_kd import SigmoidKDLoss
from kd_mm.losses.sp import SPLoss
from kd_mm.losses.vid import VIDLoss

__all__ = ['ABLoss', 'CCLoss', 'CWDLoss', 'FGDLoss', 'FSPLoss', 'FTLoss', 'FitNetLoss', 'KDLoss', 'MGDLoss', 'NSTLoss',
           'PKDLoss', 'PKTLoss', 'RKDLoss', 'SPLoss', 'SigmoidKDLoss', 'SoftmaxKDLoss', 'VIDLoss']
