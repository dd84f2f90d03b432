"""What is carried from room to room: batches, records, the views of heads."""

from kd_mm.types.batch import Features, Given, KDBatch, StepInfo, Targets
from kd_mm.types.dense import Assignment, CrossHead, DenseView
from kd_mm.types.proposals import RoIView
from kd_mm.types.query import MaskQueryView, QueryAssignment, QueryView
from kd_mm.types.records import Call, Recorded

__all__ = ['Assignment', 'Call', 'CrossHead', 'DenseView', 'Features', 'Given', 'KDBatch', 'MaskQueryView',
           'QueryAssignment', 'QueryView', 'Recorded', 'RoIView', 'StepInfo', 'Targets']
