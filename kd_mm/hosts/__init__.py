"""All that knows mmdet and mmseg: places, paths, taps, models, checkpoints, heads."""
