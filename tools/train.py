#!/usr/bin/env python3
"""Forwarder: ``kd-mm train``, for a checkout without installation; the code is kd_mm/lab/commands/train.py."""

from kd_mm.lab.commands.train import main

if __name__ == '__main__':
    main()
