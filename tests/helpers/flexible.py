"""FlexibleRunner for the configs of the tests."""

import copy
import uuid

from mmengine.runner import FlexibleRunner


def flexible(cfg, strategy, hooks=(), **changes):
    """A FlexibleRunner of a config with this strategy and these custom hooks."""
    cfg = copy.deepcopy(cfg)
    cfg.custom_hooks = list(hooks)
    cfg.strategy = strategy
    cfg.experiment_name = f'test_{uuid.uuid4().hex}'
    cfg.visualizer.name = cfg.experiment_name
    cfg.update(changes)
    return FlexibleRunner.from_cfg(cfg)
