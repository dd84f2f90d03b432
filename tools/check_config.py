#!/usr/bin/env python3
"""Forwarder: ``kd-mm check``, for whoever has a checkout and nothing installed; the code is kd_mm/cli/check.py."""

import sys

from kd_mm.cli.check import main

if __name__ == '__main__':
    sys.exit(main())
