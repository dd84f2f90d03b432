#!/usr/bin/env python3
"""Forwarder: ``kd-mm train``, for whoever has a checkout and nothing installed; the code is kd_mm/cli/train.py."""

from kd_mm.cli.train import main

if __name__ == '__main__':
    main()
