"""Forwarder of an old name, for one release: write ``from kd_mm import DistillHook``."""

from kd_mm.engine.hook import DistillHook

__all__ = ['DistillHook']
