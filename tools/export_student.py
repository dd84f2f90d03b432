#!/usr/bin/env python3
"""Forwarder: ``kd-mm export``, for whoever has a checkout and nothing installed; the code is kd_mm/cli/export.py."""

from kd_mm.cli.export import main

if __name__ == '__main__':
    main()
