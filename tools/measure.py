#!/usr/bin/env python3
"""Forwarder: ``kd-mm profile``, for a checkout without installation; the code is kd_mm/lab/commands/profile.py."""

import sys

from kd_mm.lab.commands.profile import main

if __name__ == '__main__':
    sys.exit(main())
