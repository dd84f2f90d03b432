#!/usr/bin/env python3
"""Forwarder: ``kd-mm test``, for whoever has a checkout and nothing installed; the code is kd_mm/cli/test.py."""

from kd_mm.cli.test import main

if __name__ == '__main__':
    main()
