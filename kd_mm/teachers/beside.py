"""``input_key=``: a teacher is shown another picture of the same scene (infrared, depth) that a pipeline put beside it.

The picture is an array (H, W) or (H, W, C) in the ``metainfo`` of each data sample, of the size of the student's; see
:mod:`kd_mm.hosts.transforms` for how it gets there.
"""

from typing import Any, List, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_mm.hosts.samples import is_table
from kd_mm.teachers.preprocess import _LUMA, Normalisation

#: Where a field goes, for messages.
MEND = ("put it beside the picture with dict(type='kd_mm.LoadImageBeside', key={key!r}, ...) and "
        "dict(type='kd_mm.SplitImageBeside', key={key!r}) around the transforms of the training pipeline, and name it "
        "in meta_keys of PackDetInputs or PackSegInputs")


def pictures_beside(teacher: Any, inputs: Tensor, data_samples: Any) -> Tensor:
    """The field of a batch, normalised and padded as the teacher's own preprocessor does it.

    Args:
        teacher: its ``input_key``, its own normalisation and its channels.
        inputs: the student's batch (N, C, Hin, Win); the field gets its size.
        data_samples: with the field in their metainfo.  Random samples of a first pass, which none of them has, give
            random pictures.

    Raises:
        ValueError: a sample does not have it, or its channels are not those of the teacher.
    """
    if is_table(data_samples):
        raise ValueError(f'teacher {teacher.name}: input_key={teacher.input_key!r} is a field of the metainfo of data '
                         'samples, and these batches have none: their labels are one tensor. Collate them by '
                         "train_dataloader.collate_fn=dict(type='pseudo_collate') with the host's plain "
                         'data_preprocessor (mmdet.DetDataPreprocessor)')
    own: Normalisation = teacher._to
    wanted = teacher.channels[1]
    found = [(getattr(sample, 'metainfo', None) or {}).get(teacher.input_key) for sample in data_samples or ()]
    if not found or all(value is None for value in found) and all(synthetic(sample) for sample in data_samples):
        noise = torch.linspace(-1, 1, inputs[:, :1].numel(), device=inputs.device).view_as(inputs[:, :1])
        return noise.sin().expand(-1, wanted, -1, -1).to(inputs.dtype).contiguous()
    images = inputs.new_full((len(found), wanted, inputs.shape[-2], inputs.shape[-1]), own.pad_value)
    for index, (value, sample) in enumerate(zip(found, data_samples)):
        picture = _picture(teacher, value, _shape(sample, inputs), wanted, own, index).to(inputs.device)
        picture = (picture - own.mean.to(picture)) / own.std.to(picture)
        images[index, :, :picture.shape[-2], :picture.shape[-1]] = picture.to(images.dtype)
    return images


def synthetic(sample: Any) -> bool:
    """Whether a sample is one of :mod:`kd_mm.hosts.synthetic`, which has no real picture."""
    return str(getattr(sample, 'metainfo', {}).get('img_path', '')).startswith('synthetic/')


def missing_field(name: str, key: str, metainfo: Any) -> str:
    """The refusal of data without a field."""
    return (f'teacher {name}: input_key={key!r}, and the metainfo of a training sample has {", ".join(metainfo)} only: '
            + MEND.format(key=key))


def _shape(sample: Any, inputs: Tensor) -> Tuple[int, int]:
    """Size of the picture without padding."""
    shape = sample.metainfo.get('img_shape') or inputs.shape[-2:]
    padding = sample.metainfo.get('padding_size')  # of mmseg, whose img_shape may be that of the padded picture
    height, width = min(shape[0], inputs.shape[-2]), min(shape[1], inputs.shape[-1])
    if padding is not None and len(padding) == 4:
        height, width = min(height, inputs.shape[-2] - padding[3]), min(width, inputs.shape[-1] - padding[1])
    return int(height), int(width)


def _picture(teacher: Any, value: Any, size: Tuple[int, int], wanted: int, own: Normalisation, index: int) -> Tensor:
    """One field as (C, h, w) float32 with the channels of the teacher, before normalisation."""
    key = teacher.input_key
    if value is None:
        raise ValueError(f'teacher {teacher.name}: input_key={key!r}, and sample {index} of the batch has no such '
                         f'field in its metainfo: {MEND.format(key=key)}')
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value).astype(np.float32))
    tensor = tensor.float()
    if tensor.dim() == 2:
        tensor = tensor[:, :, None]
    if tensor.dim() != 3:
        raise ValueError(f'teacher {teacher.name}: the field {key!r} has the shape {tuple(tensor.shape)}, and a '
                         'picture is (H, W) or (H, W, C)')
    tensor = tensor.permute(2, 0, 1)
    channels = tensor.shape[0]
    if (channels, wanted) == (1, 3):
        tensor = tensor.expand(3, -1, -1)
    elif (channels, wanted) == (3, 1):
        tensor = (tensor * tensor.new_tensor(_LUMA[::-1]).view(3, 1, 1)).sum(0, keepdim=True)  # read as BGR
    elif channels != wanted:
        raise ValueError(f'teacher {teacher.name} takes pictures of {wanted} channels, and the field {key!r} has '
                         f'{channels}')
    elif channels == 3 and own.swapped:
        tensor = tensor.flip(0)
    if tuple(tensor.shape[-2:]) != size:  # the data preprocessor may have resized the whole batch
        tensor = F.interpolate(tensor[None], size=size, mode='bilinear', align_corners=False)[0]
    return tensor


def first_problem(teachers: List[Any], sample: Any) -> Optional[str]:
    """What is wrong with the fields of a first sample of the training data, as a sentence; None if nothing."""
    metainfo = getattr(sample, 'metainfo', {})
    for teacher in teachers:
        if teacher.input_key is None:
            continue
        if teacher.input_key not in metainfo:
            return missing_field(teacher.name, teacher.input_key, metainfo)
        try:
            _picture(teacher, metainfo[teacher.input_key], (8, 8), teacher.channels[1], teacher._to, 0)
        except ValueError as error:
            return str(error)
    return None
