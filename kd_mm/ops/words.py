"""Numbers in sentences."""

from typing import Optional


def count(number: int, word: str, many: Optional[str] = None) -> str:
    """A number and what it counts, in the singular for one.

    Args:
        number: how many.
        word: of one.
        many: of several, where it is not ``word`` with an s.

    Example:
        >>> count(1, 'picture'), count(0, 'picture'), count(2, 'batch', 'batches')
        ('1 picture', '0 pictures', '2 batches')
    """
    return f'{number} {word if number == 1 else many or f"{word}s"}'
