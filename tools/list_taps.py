#!/usr/bin/env python3
"""Forwarder: ``kd-mm taps``, for whoever has a checkout and nothing installed; the code is kd_mm/cli/taps.py."""

import sys

from kd_mm.cli.taps import main

if __name__ == '__main__':
    sys.exit(main())
