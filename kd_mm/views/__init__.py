"""Views: what a head of the host predicted and assigned, in one form for every kind of head."""

from kd_mm.views.cross_head import align_moments, cross_head_outputs, held_features, tower_taps
from kd_mm.views.dense_head import Assignment, DenseView, assignment_tap, dense_view, read_assignment
from kd_mm.views.mask_queries import MaskQueryView, mask_query_view
from kd_mm.views.query_head import QueryAssignment, QueryView, query_taps, query_view
from kd_mm.views.roi_head import RoIView, compared, proposal_taps, roi_views, rpn_views

__all__ = ['Assignment', 'DenseView', 'MaskQueryView', 'QueryAssignment', 'QueryView', 'RoIView', 'align_moments',
           'assignment_tap', 'compared', 'cross_head_outputs', 'dense_view', 'held_features', 'mask_query_view',
           'proposal_taps', 'query_taps', 'query_view', 'read_assignment', 'roi_views', 'rpn_views', 'tower_taps']
