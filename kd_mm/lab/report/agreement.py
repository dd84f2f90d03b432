"""How alike the features of student and teacher are, level by level, over several images."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.paths import expand_paths
from kd_mm.hosts.places import find
from kd_mm.hosts.taps import Tap, image_size
from kd_mm.hosts.tokens import TokenSizeError
from kd_mm.ops.modes import eval_mode
from kd_mm.ops.similarity import grid, linear_cka

#: Places that are compared.
PLACES = ('@backbone', '@neck', '@logits')
#: Cells of an image whose features are compared; those of all images go into one number.
CELLS = 64

#: Place -> levels (1, C, H, W).
Maps = Dict[str, List[Tensor]]
#: (place, index of the level) -> rows (M, C).
Rows = Dict[Tuple[str, int], List[Tensor]]


def features(model: Any, batch: Dict[str, Any]) -> Maps:
    """The maps at :data:`PLACES` of one image; places that a model has not, or that are no maps, are left out.

    Args:
        model: of a host.
        batch: what its data preprocessor gives: ``inputs`` and ``data_samples``.
    """
    places, seen = {}, set()
    for name in PLACES:
        try:
            place = find(model, name)
            paths = tuple(path for pattern in place.paths for path in expand_paths(model, [pattern]))
        except (KeyError, ValueError):
            continue
        if paths not in seen:  # without a neck '@neck' is the backbone
            seen.add(paths)
            places[name] = paths, place.pick
    taps = {path: Tap(model, path) for paths, _ in places.values() for path in paths}
    found: Maps = {}
    try:
        for tap in taps.values():
            tap.arm(image_size(batch['inputs']))
        with torch.no_grad(), eval_mode(model):
            forward_tensor(model, batch['inputs'], batch['data_samples'], list(taps))
        for tap in taps.values():
            tap.disarm()
        for name, (paths, pick) in places.items():
            try:
                tensors = tuple(tensor for path in paths for tensor in taps[path].read())
            except (RuntimeError, TokenSizeError):
                continue
            tensors = tensors if pick is None else pick(tensors)
            if tensors and all(tensor.dim() == 4 for tensor in tensors):
                found[name] = [tensor.float() for tensor in tensors]
    finally:
        for tap in taps.values():
            tap.clear()
    return found


class Alike:
    """Gathers features at the same places of a teacher and of one or more other models, and compares them.

    Attributes:
        shapes: (place, level) -> (channels, H, W) of the teacher in the first image.
    """

    def __init__(self) -> None:
        self.shapes: Dict[Tuple[str, int], Tuple[int, ...]] = {}
        self._rows: Dict[str, Tuple[Rows, Rows]] = {}

    def see(self, name: str, maps: Maps, teacher: Maps) -> None:
        """Add one image of a model.  Of different numbers of levels the last ones meet."""
        own, theirs = self._rows.setdefault(name, ({}, {}))
        for place in maps:
            if place not in teacher:
                continue
            count = min(len(maps[place]), len(teacher[place]))
            for index, pair in enumerate(zip(maps[place][-count:], teacher[place][-count:])):
                key = place, index
                self.shapes.setdefault(key, tuple(pair[1].shape[1:]))
                for rows, tensor in zip((own, theirs), grid(pair, CELLS)):
                    rows.setdefault(key, []).append(tensor.cpu())

    def numbers(self, name: str) -> Dict[str, Optional[float]]:
        """``'@neck 0'`` -> linear CKA (:func:`kd_mm.ops.similarity.linear_cka`) with the teacher, of all images."""
        own, theirs = self._rows.get(name, ({}, {}))
        return {f'{place} {index}': known(linear_cka(torch.cat(own[place, index]), torch.cat(theirs[place, index])))
                for place, index in own}


def known(value: Tensor) -> Optional[float]:
    """A number; None where it is not defined."""
    return float(value) if bool(torch.isfinite(value)) else None


def prepared(model: nn.Module, sample: Any, collate: Any) -> Dict[str, Any]:
    """One sample of a data set as the model's own data preprocessor gives it."""
    preprocessor: Any = model.data_preprocessor
    return preprocessor(collate([sample]), False)


def mean_at(numbers: Dict[str, Optional[float]], *places: str) -> Optional[float]:
    """The mean over the levels of some places; None where nothing is known.

    Example:
        >>> mean_at({'@neck 0': 0.5, '@neck 1': 0.75, '@logits 0': 0.1}, '@neck')
        0.625
    """
    found = [value for key, value in numbers.items() if value is not None and key.split()[0] in places]
    return sum(found) / len(found) if found else None


def lowest(numbers: Dict[str, Optional[float]], places: Sequence[str] = ('@backbone', '@neck')) -> Optional[str]:
    """The level with the smallest number, of those places; None where nothing is known.

    Example:
        >>> lowest({'@neck 0': 0.9, '@neck 1': 0.4, '@logits 0': 0.1})
        '@neck 1'
    """
    found = {key: value for key, value in numbers.items() if value is not None and key.split()[0] in places}
    return min(found, key=found.__getitem__) if found else None
