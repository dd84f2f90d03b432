"""Forwarder of an old name, for one release: write ``from kd_mm import Distiller``."""

from kd_mm.engine.distiller import Distiller

__all__ = ['Distiller']
