"""Runner hooks."""

from kd_mm.hooks.distill_hook import DistillHook

__all__ = ['DistillHook']
