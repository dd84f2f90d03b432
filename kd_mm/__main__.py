"""``python -m kd_mm`` is ``kd-mm``."""

from kd_mm.cli.app import run

run()
