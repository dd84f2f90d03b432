"""All that knows the hosts: their table, places, paths, taps, models, checkpoints, heads."""
