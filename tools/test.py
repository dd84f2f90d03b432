#!/usr/bin/env python3
"""Forwarder: ``kd-mm test``, for a checkout without installation; the code is kd_mm/lab/commands/test.py."""

from kd_mm.lab.commands.test import main

if __name__ == '__main__':
    main()
