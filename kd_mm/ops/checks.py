"""Checks of constructor arguments: each returns the value that is to be used, or says class, argument and value.

Config files and ``--cfg-options`` easily give a text instead of a number (``tau='4'``, ``align='no'``).  Text is never
turned into a number or a truth value, and True is not the number 1.  An int for a float, a float without a fraction for
a whole number (``4.0``) and the scalars of numpy are taken.
"""

import math
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any, Callable, List, NoReturn, Optional, Sequence, Tuple

import numpy as np


def _refuse(owner: str, name: str, value: Any, needed: str) -> NoReturn:
    kind = ', not text' if isinstance(value, str) else ', not a truth value' if isinstance(value, bool) else ''
    raise ValueError(f'{owner}: {name}={value!r} must be {needed}{kind}')


def _finite(owner: str, name: str, value: Any, where: str) -> float:
    """``value`` as a float if it is a number, not NaN and not infinite; ``where`` is the range for the message."""
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond the largest float
            number = math.inf
    if not math.isfinite(number):
        _refuse(owner, name, value, f'a finite number{where}')
    return number


def number(owner: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a float if it is a finite number within ``low`` and ``high``, both included.

    Raises:
        ValueError: it is not.

    Example:
        >>> number('MGDLoss', 'mask_ratio', 1, 0, 1)
        1.0
    """
    if math.isinf(low):
        where = '' if math.isinf(high) else f' up to {high:g}'
    else:
        where = f' from {low:g}' if math.isinf(high) else f' within {low:g}..{high:g}'
    found = _finite(owner, name, value, where)
    if not low <= found <= high:
        _refuse(owner, name, value, where.strip())
    return found


def from_zero(owner: str, name: str, value: Any) -> float:
    """``value`` as a float if it is a finite number from 0: a weight of a term, for example.

    Raises:
        ValueError: it is not.

    Example:
        >>> from_zero('DISTLoss', 'beta', 0)
        0.0
    """
    return number(owner, name, value, 0.0)


def positive(owner: str, name: str, value: Any, high: float = math.inf) -> float:
    """``value`` as a float if it is a finite number above 0 and not above ``high``.

    Raises:
        ValueError: it is not.

    Example:
        >>> positive('CWDLoss', 'tau', 4)
        4.0
    """
    where = ' above 0' if math.isinf(high) else f' above 0 and at most {high:g}'
    found = _finite(owner, name, value, where)
    if not 0 < found <= high:
        _refuse(owner, name, value, where.strip())
    return found


def whole(owner: str, name: str, value: Any, low: Optional[int] = 1) -> int:
    """``value`` as an int if it is a whole number from ``low`` (None: any).

    Raises:
        ValueError: it is not.

    Example:
        >>> whole('ICDLoss', 'heads', 8.0)
        8
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not (
            isinstance(value, Integral) or float(value).is_integer()) or (low is not None and value < low):
        _refuse(owner, name, value, 'a whole number' + ('' if low is None else f' from {low}'))
    return int(float(value)) if not isinstance(value, Integral) else int(value)


def boolean(owner: str, name: str, value: Any) -> bool:
    """``value`` as a bool if it is True or False (or 1 or 0).

    Raises:
        ValueError: it is not; ``'no'``, which Python takes for true, is refused.

    Example:
        >>> boolean('CrossKDLoss', 'align', False)
        False
    """
    if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, Integral) and value in (0, 1)):
        _refuse(owner, name, value, 'True or False')
    return bool(value)


def one_of(owner: str, name: str, value: Any, choices: Sequence[Any]) -> Any:
    """The entry of ``choices`` that ``value`` is equal to.

    Raises:
        ValueError: there is none; the choices are listed.

    Example:
        >>> one_of('CWDLoss', 'divisor', 'teacher', ('teacher', 'student'))
        'teacher'
    """
    for choice in choices if isinstance(value, (str, Real)) or value is None else ():
        if value == choice and isinstance(value, bool) == isinstance(choice, bool):
            return choice
    raise ValueError(f'{owner}: {name}={value!r} is not one of {", ".join(map(repr, choices))}')


def entries(owner: str, name: str, value: Any, check: Callable[[str, str, Any], Any]) -> List[Any]:
    """The entries of a list (tuple, set, array), each through one of the checks above.

    Raises:
        ValueError: it is no list, is empty, or an entry is refused; the message names its position.

    Example:
        >>> entries('ReviewKDLoss', 'pools', (4, 2), whole)
        [4, 2]
    """
    if isinstance(value, (str, Mapping)) or not isinstance(value, Collection) or not len(value):
        _refuse(owner, name, value, 'a list that is not empty')
    return [check(owner, f'{name}[{index}]', entry) for index, entry in enumerate(value)]


def class_indices(owner: str, name: str, value: Any) -> Optional[List[int]]:
    """Class indices, each a whole number from 0; None (all classes) as it is.

    Raises:
        ValueError: they are not, or there is none.

    Example:
        >>> class_indices('SegClassRegion', 'classes', [0, 11])
        [0, 11]
    """
    return None if value is None else entries(owner, name, value, _label)


def _label(owner: str, name: str, value: Any) -> int:
    return whole(owner, name, value, 0)


def pair(owner: str, name: str, value: Any) -> Tuple[int, int]:
    """``value`` as (height, width) if it is two whole numbers from 1.

    Raises:
        ValueError: it is not.

    Example:
        >>> pair('AfDCDLoss', 'patch', [4, 4])
        (4, 4)
    """
    if isinstance(value, (str, Mapping)) or not isinstance(value, Collection) or len(value) != 2:
        _refuse(owner, name, value, 'a height and a width')
    height, width = entries(owner, name, value, whole)
    return height, width


def texts(owner: str, name: str, value: Any, example: str) -> Any:
    """``value`` if it is a text, or a list of them that is not empty: paths, names.

    Raises:
        ValueError: it is not.

    Example:
        >>> texts('loss_x', 'at', ['neck', 'backbone'], "'neck'")
        ['neck', 'backbone']
    """
    if not isinstance(value, str) and (isinstance(value, Mapping) or not isinstance(value, Collection) or not value
                                       or not all(isinstance(part, str) for part in value)):
        raise ValueError(f'{owner}: {name}={value!r} must be a text such as {example}, or a list of them')
    return value


def factors(owner: str, **given: Any) -> List[float]:
    """Factors from 0, not all of them 0.

    Raises:
        ValueError: they are not.

    Example:
        >>> factors('BCKDLoss', class_weight=1, box_weight=0)
        [1.0, 0.0]
    """
    found = [_finite(owner, name, value, ' from 0') for name, value in given.items()]
    if min(found) < 0 or not any(found):
        said = ', '.join(f'{name}={value!r}' for name, value in given.items())
        raise ValueError(f'{owner}: {said} must not be negative, and one above 0')
    return found


def sample_limit(owner: str, limit: Any) -> Optional[int]:
    """``limit`` if it is None or a whole number from 2: a relation needs two samples.

    Raises:
        ValueError: it is not.

    Example:
        >>> sample_limit('RKDLoss', 128)
        128
    """
    return None if limit is None else whole(owner, 'limit', limit, 2)
