#!/usr/bin/env python3
"""Forwarder: ``kd-mm export``, for a checkout without installation; the code is kd_mm/lab/commands/export.py."""

from kd_mm.lab.commands.export import main

if __name__ == '__main__':
    main()
