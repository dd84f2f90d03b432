"""Re-parametrised blocks, which have several branches in training and one convolution when they are deployed.

RepVGG began it; YOLOv6, YOLOv7 l and x, PPYOLOE and others have such blocks.  They all merge their branches by a method
of the same name, ``switch_to_deploy``, and have other keys afterwards.
"""

import copy
import inspect
from typing import Any, Collection, List, Set, Tuple

from torch import nn

from kd_mm.ops.words import count

METHOD = 'switch_to_deploy'


def blocks_of(model: nn.Module) -> List[Tuple[str, Any]]:
    """Path and module of the blocks that can be merged and are not, the outer ones first."""
    return [(path, module) for path, module in model.named_modules()
            if _merges(getattr(module, METHOD, None)) and not getattr(module, 'deploy', False)]


def _merges(method: Any) -> bool:
    """Whether it is such a method; MMPose has one of this name that wants settings and does something else."""
    return callable(method) and not any(
        parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for parameter in inspect.signature(method).parameters.values())


def merge(model: nn.Module) -> None:
    """Merge the branches of all blocks in place.

    In evaluation the model computes what it did before, up to rounding; trained it cannot be any more.
    """
    for _, module in blocks_of(model):
        if not getattr(module, 'deploy', False):  # an outer one may have merged those inside of it
            _switch(module)


def take_form(model: nn.Module, keys: Collection[str]) -> List[str]:
    """Merge those blocks in place whose weights a file has in the merged form.

    Args:
        model: in the form of its config.
        keys: of the file, under the names of the model.

    Returns:
        What was done, as sentences; empty where the forms are the same.
    """
    done, there = [], set(keys)
    for path, module in blocks_of(model):
        prefix = f'{path}.' if path else ''
        if getattr(module, 'deploy', False) or _keys(module, prefix) <= there:
            continue
        merged = copy.deepcopy(module)
        _switch(merged)
        if _keys(merged, prefix) <= there:
            _switch(module)
            done.append(path)
    if not done:
        return []
    return [f'has the merged form of {count(len(done), "re-parametrised block")} ({done[0]}'
            f'{", ..." if len(done) > 1 else ""}), which the model takes as well ({METHOD})']


def _keys(module: nn.Module, prefix: str) -> Set[str]:
    return {prefix + key for key in module.state_dict() if not key.endswith('num_batches_tracked')}


def _switch(module: Any) -> None:
    module.switch_to_deploy()
    module.train(module.training)  # the new convolution comes in training mode
