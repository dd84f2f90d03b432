"""Which modules of a model are heads that a loss on whole heads compares: the mend where another one was named."""

from typing import Any, Dict, List, Tuple

from torch import nn

from kd_mm.hosts.heads.query import has_steps, query_count
from kd_mm.hosts.rows import shared_places
from kd_mm.types.dense import DenseView
from kd_mm.types.query import MaskQueryView, QueryView

#: Kind of view -> what its heads give, what all of them have (one of these), and what sets those of the hosts apart.
KINDS: Dict[type, Tuple[str, Tuple[str, ...], str]] = {
    DenseView: ('maps of class scores and boxes', ('cls_out_channels', 'head_module'), 'prior_generator'),
    QueryView: ('classes and boxes of queries', ('loss_cls', ), 'sync_cls_avg_factor'),
    MaskQueryView: ('classes and masks of queries', ('loss_mask', ), 'mask_embed')}


def heads(model: nn.Module, kind: type) -> List[str]:
    """Paths of the heads in a model that give one kind of view.

    Args:
        model: of the host.
        kind: :class:`DenseView`, :class:`QueryView` or :class:`MaskQueryView`.

    Example:
        >>> heads(nn.Sequential(nn.Linear(1, 1)), DenseView)
        []
    """
    _, common, own = KINDS[kind]
    return [path for path, module in model.named_modules() if path and _has(module, common) and hasattr(module, own)
            and shared_places(model, path) is None and (kind is not QueryView or _with_queries(model, module))]


def _has(module: Any, names: Tuple[str, ...]) -> bool:
    return any(hasattr(module, name) for name in names)


def of_queries(model: nn.Module, path: str) -> bool:
    """Whether a module gives one thing for each query: a head of queries, the decoder before it, and their parts."""
    if any(part == 'transformer_decoder' for part in path.split('.')):
        return True
    owners = [*heads(model, QueryView), *heads(model, MaskQueryView), *(['decoder'] if has_steps(model) else [])]
    return any(path == owner or (path.startswith(f'{owner}.') and '.pixel_decoder' not in path) for owner in owners)


def _with_queries(model: nn.Module, module: Any) -> bool:
    """Whether a head is one of a detector with queries: by the steps of its model, or as it counts queries itself."""
    return has_steps(model) or (query_count(module) is not None and not hasattr(module, 'loss_mask'))


def need_head(owner: str, side: str, model: nn.Module, path: str, module: Any, kind: type) -> None:
    """Raise a ValueError for a module that is no head of this kind; it names those that are.

    Args:
        owner: class name of the loss.
        side: ``'student'`` or ``'teacher'``.
        model, path: where ``module`` is.
        kind: see :func:`heads`.
    """
    given, common, _ = KINDS[kind]
    if _has(module, common) and (kind is not QueryView or _with_queries(model, module)):
        return  # a head of one's own is looked at when it has run
    found = heads(model, kind)
    mend = (f'In {type(model).__name__} it is {" or ".join(f"{name!r}" for name in found)}' if found else
            f"{type(model).__name__} has none: use another loss, such as PKDLoss (at='@neck')")
    raise ValueError(f'{owner} compares heads that give {given}, and {side} {path!r} ({type(module).__name__}) is '
                     f'none. {mend}')
