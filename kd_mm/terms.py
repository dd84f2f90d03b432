"""Forwarder of old names, for one release."""

from kd_mm.engine.term import Term
from kd_mm.problems import ConfigProblems, Problems

__all__ = ['ConfigProblems', 'Problems', 'Term']
