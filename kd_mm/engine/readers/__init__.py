"""Readers: one for each kind of thing that a term compares."""

from kd_mm.engine.readers.base import Comparison, Reader, Records
from kd_mm.engine.readers.heads import HeadReader
from kd_mm.engine.readers.maps import MapReader
from kd_mm.engine.readers.proposals import ProposalReader

__all__ = ['Comparison', 'HeadReader', 'MapReader', 'ProposalReader', 'Reader', 'Records']
