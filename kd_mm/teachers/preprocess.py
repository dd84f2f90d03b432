"""What a teacher expects of its input."""

from typing import Any, Optional

import torch
from torch import Tensor, nn


class Normalisation:
    """Mean, std, channel order and padding of a data preprocessor."""

    def __init__(self, preprocessor: Optional[nn.Module]):
        enabled = bool(getattr(preprocessor, '_enable_normalize', False))
        mean = getattr(preprocessor, 'mean', None) if enabled else None
        std = getattr(preprocessor, 'std', None) if enabled else None
        # One number is that of every channel.
        self.mean = torch.zeros(1, 1, 1) if mean is None else mean.detach().float().reshape(-1, 1, 1)
        self.std = torch.ones(1, 1, 1) if std is None else std.detach().float().reshape(-1, 1, 1)
        # mmdet and mmengine call it _channel_conversion, mmseg channel_conversion.
        self.swapped = bool(getattr(preprocessor, '_channel_conversion', False)
                            or getattr(preprocessor, 'channel_conversion', False))
        self.pad_value = float(getattr(preprocessor, 'pad_value', getattr(preprocessor, 'pad_val', 0)) or 0)

    def __eq__(self, other: Any) -> bool:
        return (isinstance(other, Normalisation) and self.swapped == other.swapped
                and self.pad_value == other.pad_value and _same_numbers(self.mean, other.mean)
                and _same_numbers(self.std, other.std))

    def to(self, device: torch.device) -> 'Normalisation':
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self


def _same_numbers(first: Tensor, second: Tensor) -> bool:
    first, second = first.cpu(), second.cpu()
    return (1 in (first.numel(), second.numel()) or first.shape == second.shape) and bool((first == second).all())


#: Grey from red, green and blue (ITU-R BT.601), as cv2 reads a colour picture in grey.
_LUMA = (0.299, 0.587, 0.114)
