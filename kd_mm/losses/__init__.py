"""Distillation losses, one file a method."""

from kd_mm.losses.ab import ABLoss
from kd_mm.losses.af_dcd import AfDCDLoss
from kd_mm.losses.aicsd import AICSDLoss
from kd_mm.losses.at import ATLoss
from kd_mm.losses.base import KDLoss
from kd_mm.losses.bckd import BCKDLoss
from kd_mm.losses.bpkd import BPKDLoss
from kd_mm.losses.cc import CCLoss
from kd_mm.losses.chen import ChenBoxLoss, ChenClassLoss
from kd_mm.losses.cirkd import CIRKDMemoryLoss, CIRKDMiniBatchLoss
from kd_mm.losses.cirkd_v2 import CIRKDChannelLoss
from kd_mm.losses.crosskd import CrossKDLoss
from kd_mm.losses.cwd import CWDLoss
from kd_mm.losses.defeat import DeFeatClassLoss, DeFeatLoss
from kd_mm.losses.detrdistill import DETRDistillFeatureLoss, DETRDistillLogitsLoss, DETRDistillQueryPriorLoss
from kd_mm.losses.dist import DISTLoss
from kd_mm.losses.dkd import DKDLoss
from kd_mm.losses.dsd import DSDLoss
from kd_mm.losses.fbkd import FBKDLoss
from kd_mm.losses.fgd import FGDLoss
from kd_mm.losses.fgfi import FGFILoss
from kd_mm.losses.fitnet import FitNetLoss
from kd_mm.losses.freekd import FreeKDLoss
from kd_mm.losses.frs import FRSLoss
from kd_mm.losses.fsp import FSPLoss
from kd_mm.losses.ft import FTLoss
from kd_mm.losses.gid import GIDLoss
from kd_mm.losses.golsd import GOLSDLoss
from kd_mm.losses.icd import ICDLoss
from kd_mm.losses.ickd import ICKDLoss
from kd_mm.losses.idd import IDDLoss
from kd_mm.losses.ifvd import IFVDLoss
from kd_mm.losses.kd import SoftmaxKDLoss
from kd_mm.losses.kd_detr import KDDETRLoss
from kd_mm.losses.ktaad import KTAADLoss
from kd_mm.losses.ld import LDLoss
from kd_mm.losses.learned import Learner
from kd_mm.losses.mask_query import MaskQueryLoss
from kd_mm.losses.maskd import MasKDLoss
from kd_mm.losses.mgd import MGDLoss
from kd_mm.losses.mimic import MimicLoss
from kd_mm.losses.nst import NSTLoss
from kd_mm.losses.ofd import OFDLoss
from kd_mm.losses.opponent import Opponent
from kd_mm.losses.pfi import PFILoss
from kd_mm.losses.pkd import PKDLoss
from kd_mm.losses.pkt import PKTLoss
from kd_mm.losses.reviewkd import ReviewKDLoss
from kd_mm.losses.rkd import RKDLoss
from kd_mm.losses.rm import RMLoss
from kd_mm.losses.sigmoid_kd import SigmoidKDLoss
from kd_mm.losses.skd_holistic import SKDHolisticLoss
from kd_mm.losses.skd_pairwise import SKDPairwiseLoss
from kd_mm.losses.sp import SPLoss
from kd_mm.losses.transkd import TransKDLoss
from kd_mm.losses.vid import VIDLoss
from kd_mm.losses.zero_first_order import ZeroFirstOrderLoss

__all__ = [
    'ABLoss',
    'AICSDLoss',
    'ATLoss',
    'AfDCDLoss',
    'BCKDLoss',
    'BPKDLoss',
    'CCLoss',
    'CIRKDChannelLoss',
    'CIRKDMemoryLoss',
    'CIRKDMiniBatchLoss',
    'CWDLoss',
    'ChenBoxLoss',
    'ChenClassLoss',
    'CrossKDLoss',
    'DETRDistillFeatureLoss',
    'DETRDistillLogitsLoss',
    'DETRDistillQueryPriorLoss',
    'DISTLoss',
    'DKDLoss',
    'DSDLoss',
    'DeFeatClassLoss',
    'DeFeatLoss',
    'FBKDLoss',
    'FGDLoss',
    'FGFILoss',
    'FRSLoss',
    'FSPLoss',
    'FTLoss',
    'FitNetLoss',
    'FreeKDLoss',
    'GIDLoss',
    'GOLSDLoss',
    'ICDLoss',
    'ICKDLoss',
    'IDDLoss',
    'IFVDLoss',
    'KDDETRLoss',
    'KDLoss',
    'KTAADLoss',
    'LDLoss',
    'Learner',
    'MGDLoss',
    'MasKDLoss',
    'MaskQueryLoss',
    'MimicLoss',
    'NSTLoss',
    'OFDLoss',
    'Opponent',
    'PFILoss',
    'PKDLoss',
    'PKTLoss',
    'RKDLoss',
    'RMLoss',
    'ReviewKDLoss',
    'SKDHolisticLoss',
    'SKDPairwiseLoss',
    'SPLoss',
    'SigmoidKDLoss',
    'SoftmaxKDLoss',
    'TransKDLoss',
    'VIDLoss',
    'ZeroFirstOrderLoss',
]
