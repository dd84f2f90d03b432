"""kd_mm: knowledge distillation for MMDetection 3.x and MMSegmentation 1.x.

Importing the package imports neither host.  ``type='kd_mm.DistillHook'`` in a config finds everything else by itself.
"""

from kd_mm.version import __version__

__all__ = ['__version__']
