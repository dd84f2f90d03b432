"""``view=``: a teacher sees the batch at another size than the student."""

import math
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Tuple

import torch.nn.functional as F
from torch import Tensor

from kd_mm.ops.checks import one_of, pair, positive, whole
from kd_mm.types.records import Seen

FITS = ('resize', 'pad')
_KEYS = ('scale', 'size', 'multiple_of', 'fit')


@dataclass(frozen=True)
class View:
    """How a teacher sees a batch (N, C, Hin, Win) of the student.

    Attributes:
        scale: factor on height and width, above 0. Default 1.
        size: (H, W) in pixels to which every batch is brought instead; None for none.
        multiple_of: (height, width) in pixels of which the result is a multiple; it grows to the next one. Default 1.
        fit: how it grows: ``'resize'`` (default) stretches it by less than a multiple, ``'pad'`` adds pixels at the
            right and at the bottom.
    """

    scale: float = 1.0
    size: Optional[Tuple[int, int]] = None
    multiple_of: Tuple[int, int] = (1, 1)
    fit: str = 'resize'

    @property
    def identity(self) -> bool:
        """Whether every batch stays as it is."""
        return self.scale == 1 and self.size is None and self.multiple_of == (1, 1)

    def of(self, shape: Tuple[int, int]) -> Seen:
        """What becomes of a batch of (Hin, Win).

        Example:
            >>> seen = View(scale=0.5, multiple_of=(14, 14), fit='pad').of((64, 100))
            >>> seen.content, seen.size
            ((32, 50), (42, 56))
        """
        scaled = max(1, round(shape[0] * self.scale)), max(1, round(shape[1] * self.scale))
        content = self.size or scaled
        height, width = (-(-edge // multiple) * multiple for edge, multiple in zip(content, self.multiple_of))
        content = content if self.fit == 'pad' else (height, width)
        return Seen((height, width), content, shape, content == scaled and math.log2(self.scale).is_integer())

    def apply(self, images: Tensor, pad_value: float = 0.0) -> Tensor:
        """The batch as the teacher sees it; the tensor itself where nothing changes.

        It is resized bilinearly, smaller ones with an anti-aliasing filter.

        Args:
            images: (N, C, Hin, Win), normalised.
            pad_value: of the pixels that ``'pad'`` adds.
        """
        shape = (images.shape[-2], images.shape[-1])
        seen = self.of(shape)
        if seen.content != shape:
            smaller = seen.content[0] < shape[0] or seen.content[1] < shape[1]
            images = F.interpolate(images, size=seen.content, mode='bilinear', align_corners=False, antialias=smaller)
        if seen.size != seen.content:
            images = F.pad(images, (0, seen.size[1] - seen.content[1], 0, seen.size[0] - seen.content[0]),
                           value=pad_value)
        return images


def view_of(owner: str, value: Any, needs: Optional[View] = None) -> Optional[View]:
    """What ``view=`` says, with what the model itself needs.

    Args:
        owner: word for messages.
        value: None, or a dict of the fields of :class:`View`; ``multiple_of`` and ``size`` may be one number.
        needs: of a model that takes multiples of its patches only, or pictures of one size.

    Returns:
        None where every batch stays as it is.

    Raises:
        ValueError: an unknown key, a wrong value, or what the model cannot take.

    Example:
        >>> view_of('teacher', dict(scale=1.0)), view_of('teacher', dict(scale=0.5, multiple_of=16)).multiple_of
        (None, (16, 16))
    """
    needs = needs or View()
    if value is None:
        return None if needs.identity else needs
    if not isinstance(value, Mapping):
        raise ValueError(f'{owner}: view={value!r} must be a dict of {", ".join(_KEYS)}')
    unknown = sorted(set(value) - set(_KEYS))
    if unknown:
        raise ValueError(f'{owner}: view has no {unknown[0]!r}; it takes {", ".join(_KEYS)}')
    owner = f'{owner}: view'
    if value.get('size') is not None and value.get('scale') is not None:
        raise ValueError(f'{owner}: give either scale or size')
    scale = positive(owner, 'scale', 1.0 if value.get('scale') is None else value['scale'])
    size = _edges(owner, 'size', value.get('size'))
    multiple = _edges(owner, 'multiple_of', value.get('multiple_of')) or needs.multiple_of
    fit = one_of(owner, 'fit', value.get('fit', FITS[0]), FITS)
    if any(given % needed for given, needed in zip(multiple, needs.multiple_of)):
        raise ValueError(f'{owner}: multiple_of={multiple} is no multiple of the patches of this model, '
                         f'{needs.multiple_of}')
    if needs.size is not None:
        if size is not None and size != needs.size or scale != 1:
            raise ValueError(f'{owner}: this model takes pictures of {needs.size} only. Leave scale and size out, or '
                             'build it for another size (options=dict(img_size=...))')
        size = needs.size
    found = View(scale, size, multiple, fit)
    return None if found.identity else found


def _edges(owner: str, name: str, value: Any) -> Optional[Tuple[int, int]]:
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        return pair(owner, name, value)
    edge = whole(owner, name, value)
    return edge, edge
