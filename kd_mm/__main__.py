"""``python -m kd_mm`` is ``kd-mm``."""
from kd_mm.lab.commands.app import run

if __name__ == '__main__':
    run()
