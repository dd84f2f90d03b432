"""The heads of the hosts, read into the views of :mod:`kd_mm.types`."""
