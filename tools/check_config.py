#!/usr/bin/env python3
"""Forwarder: ``kd-mm check``, for a checkout without installation; the code is kd_mm/lab/commands/check.py."""

import sys

from kd_mm.lab.commands.check import main

if __name__ == '__main__':
    sys.exit(main())
