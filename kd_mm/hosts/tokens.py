"""Tokens (N, L, C) as maps: which (H, W) they make."""

import math
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

from torch import Tensor

#: Tokens that a map does not show: a class token, registers.
MAX_EXTRA = 16
#: ``tokens=``: (H, W) in cells, or the stride in pixels.
TokenSize = Union[int, Tuple[int, int]]


class TokenSizeError(ValueError):
    """More than one (H, W) fits the tokens of a tap.

    Attributes:
        shapes: of the tensors that the tap recorded, tokens as they came.
    """

    def __init__(self, message: str, shapes: Sequence[Tuple[int, ...]] = ()):
        super().__init__(message)
        self.shapes = list(shapes)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sizes_in(values: Iterable[Any]) -> List[Tuple[int, int]]:
    """Pairs of ints among the arguments or results of a call: the (H, W) that token modules pass along."""
    pairs: List[Tuple[int, int]] = []
    for value in values:
        if isinstance(value, (tuple, list)):
            if len(value) == 2 and all(map(_whole, value)):
                pairs.append((int(value[0]), int(value[1])))
            else:
                pairs.extend(_sizes_in(value))
    return pairs


def fitting_sizes(tokens: int, sizes: Iterable[Tuple[int, int]]) -> List[Tuple[int, int]]:
    """The sizes that explain a number of tokens, each once: ``H * W == tokens``; if none does, with up to 16 more.

    Example:
        >>> fitting_sizes(65, [(8, 8), (2, 2), (8, 8)]), fitting_sizes(64, [(7, 7), (8, 8), (4, 16)])
        ([(8, 8)], [(8, 8), (4, 16)])
    """
    possible = [size for size in dict.fromkeys(sizes)
                if min(size) > 0 and 0 <= tokens - size[0] * size[1] <= MAX_EXTRA]
    return [size for size in possible if size[0] * size[1] == tokens] or possible


def stride_sizes(input_shape: Tuple[int, int], strides: Iterable[int]) -> List[Tuple[int, int]]:
    """(H, W) of the maps that these strides make of an input, edges padded or cut.

    Example:
        >>> stride_sizes((64, 100), [16])
        [(4, 7), (4, 6)]
    """
    height, width = input_shape
    return list(dict.fromkeys((int(rounding(height / stride)), int(rounding(width / stride)))
                              for stride in strides for rounding in (math.ceil, math.floor)))


def guess_sizes(tokens: int, input_shape: Optional[Tuple[int, int]]) -> List[Tuple[int, int]]:
    """(H, W) of ``tokens`` cells, or of one cell fewer (a class token), by any stride from 1 to 64 of an input.

    Example:
        >>> guess_sizes(12, (48, 64)), guess_sizes(13, (48, 64)), guess_sizes(11, (48, 64))
        ([(3, 4)], [(3, 4)], [])
    """
    if input_shape is None:
        return []
    return [size for size in stride_sizes(input_shape, range(1, 65))
            if min(size) > 0 and tokens - size[0] * size[1] in (0, 1)]


def looks_like_token_size(value: Any) -> bool:
    """Whether ``tokens=`` of a loss speaks of its taps: numbers, or a dict of them by side.

    Some losses have an argument ``tokens`` of their own: a file, a state dict, tensors.
    """
    if hasattr(value, 'keys'):
        return bool(value) and set(value) <= {'student', 'teacher'}
    numbers = value if isinstance(value, (tuple, list)) else (value, )
    return bool(numbers) and all(isinstance(number, (int, float)) for number in numbers)


def token_size(value: Any) -> Optional[TokenSize]:
    """``tokens=`` of one tap, checked: None, a stride, or (H, W).

    Raises:
        ValueError: it is none of them.
    """
    if value is None or (_whole(value) and value > 0):
        return value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(_whole(edge) and edge > 0 for edge in value):
        return value[0], value[1]
    raise ValueError(f'tokens={value!r} must be (H, W), the cells of the map that the tokens make, or one whole '
                     'number, the stride of that map in pixels of the input')


def token_sizes(value: Any) -> Dict[str, Optional[TokenSize]]:
    """``tokens=`` of a loss by side: one value for both, or ``dict(student=..., teacher=...)``.

    Raises:
        ValueError: see :func:`token_size`.

    Example:
        >>> token_sizes(16), token_sizes(dict(teacher=[8, 16]))
        ({'student': 16, 'teacher': 16}, {'student': None, 'teacher': (8, 16)})
    """
    both = value if hasattr(value, 'keys') else {'student': value, 'teacher': value}
    return {side: token_size(both.get(side)) for side in ('student', 'teacher')}


def tokens_to_map(tokens: Tensor, size: Tuple[int, int]) -> Tensor:
    """(N, L, C) to (N, C, H, W); extra tokens in front (class token, registers) are dropped."""
    height, width = size
    extra = tokens.shape[1] - height * width
    return tokens[:, extra:].transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)
