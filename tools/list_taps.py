#!/usr/bin/env python3
"""Forwarder: ``kd-mm taps``, for a checkout without installation; the code is kd_mm/lab/commands/taps.py."""

import sys

from kd_mm.lab.commands.taps import main

if __name__ == '__main__':
    sys.exit(main())
