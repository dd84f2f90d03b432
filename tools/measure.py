#!/usr/bin/env python3
"""Forwarder: ``kd-mm profile``, for whoever has a checkout and nothing installed; the code is kd_mm/cli/profile.py."""

import sys

from kd_mm.cli.profile import main

if __name__ == '__main__':
    sys.exit(main())
