"""Adapters: student and teacher features into one space."""

from kd_mm.adapters.auto import auto_adapter
from kd_mm.adapters.base import Adapter
from kd_mm.adapters.conv import ConvAdapter
from kd_mm.adapters.graph import GraphAdapter
from kd_mm.adapters.norm import NormAdapter
from kd_mm.adapters.resize import ResizeAdapter
from kd_mm.adapters.sequential import SequentialAdapter

__all__ = ['Adapter', 'ConvAdapter', 'GraphAdapter', 'NormAdapter', 'ResizeAdapter', 'SequentialAdapter',
           'auto_adapter']
