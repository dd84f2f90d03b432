"""``python -m kd_mm`` is ``kd-mm``."""

from kd_mm.cli.app import run

if __name__ == '__main__':
    run()
