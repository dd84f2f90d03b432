"""Transforms that carry another picture of the same scene through the pipeline of a host, for ``input_key=``.

The second picture becomes more channels of the first, so that every geometric transform between the two moves both
alike, and is taken apart again before the sample is packed::

    train_pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='PhotoMetricDistortion'),                      # what is for three channels stands outside
        dict(type='kd_mm.LoadImageBeside', key='infrared', replace=('visible', 'infrared')),
        dict(type='Resize', scale=(640, 512), keep_ratio=True),
        dict(type='RandomFlip', prob=0.5),
        dict(type='kd_mm.SplitImageBeside', key='infrared'),
        dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor',
                                              'infrared'))]
"""

import os
from typing import Any, Dict, Optional, Sequence

import cv2
import numpy as np
from mmengine.fileio import get

from kd_mm.ops.checks import one_of
from kd_mm.registry import TRANSFORMS

#: How a file is read, by ``color_type``.
FLAGS = {'unchanged': cv2.IMREAD_UNCHANGED, 'grayscale': cv2.IMREAD_GRAYSCALE, 'color': cv2.IMREAD_COLOR}
_DTYPE = 'kd_mm_beside_dtype'


@TRANSFORMS.register_module()
class LoadImageBeside:
    """Reads a second picture of the scene and puts its channels behind those of ``img``.

    Transforms that follow must take any number of channels: Resize, RandomFlip, RandomCrop do.  A picture that is not
    uint8 makes both float32 until they are taken apart, where ``img`` is rounded back to what it was.

    Args:
        key: name of the field.
        replace: (old, new) text in ``img_path`` that makes the second path of the first; or
        template: a path with ``{folder}``, ``{stem}`` and ``{suffix}`` of the first.
        color_type: ``'unchanged'`` (default: depth in 16 bits stays), ``'grayscale'`` or ``'color'`` (BGR).

    Raises:
        ValueError: a wrong argument, or (when it is read) a file that is not there, no picture, or of another size.
    """

    def __init__(self, key: str, replace: Optional[Sequence[str]] = None, template: Optional[str] = None,
                 color_type: str = 'unchanged'):
        owner = 'LoadImageBeside'
        if not isinstance(key, str) or not key.isidentifier() or key == 'img':
            raise ValueError(f'{owner}: key={key!r} must be the name of a new field')
        if (replace is None) == (template is None) or (replace is not None and (
                isinstance(replace, str) or len(replace) != 2 or not all(isinstance(text, str) for text in replace))):
            raise ValueError(f'{owner}: give replace=(old, new), text in img_path, or template, such as '
                             "'{folder}/../depth/{stem}.png'")
        self.key, self.replace, self.template = key, replace, template
        self.color_type = one_of(owner, 'color_type', color_type, tuple(FLAGS))

    def path_of(self, image: str) -> str:
        """Path of the second picture.

        Example:
            >>> LoadImageBeside('depth', template='{folder}/../depth/{stem}.png').path_of('a/rgb/1.jpg')
            'a/rgb/../depth/1.png'
        """
        if self.template is not None:
            folder, name = os.path.split(image)
            stem, suffix = os.path.splitext(name)
            return self.template.format(folder=folder, stem=stem, suffix=suffix)
        assert self.replace is not None
        if self.replace[0] not in image:
            raise ValueError(f'LoadImageBeside: {self.replace[0]!r} of replace is not in the path {image}')
        return image.replace(self.replace[0], self.replace[1])

    def __call__(self, results: Dict[str, Any]) -> Dict[str, Any]:
        image, path = results['img'], self.path_of(results['img_path'])
        try:
            content = get(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ValueError(f'LoadImageBeside: {results["img_path"]} has no {self.key} picture: {path} is not there') \
                from error
        beside = cv2.imdecode(np.frombuffer(content, np.uint8), FLAGS[self.color_type])
        if beside is None:
            raise ValueError(f'LoadImageBeside: {path} cannot be read as a picture')
        if beside.shape[:2] != image.shape[:2]:
            raise ValueError(f'LoadImageBeside: {path} has {beside.shape[0]}x{beside.shape[1]} pixels and '
                             f'{results["img_path"]} {image.shape[0]}x{image.shape[1]}: both must show the same')
        beside = beside[..., None] if beside.ndim == 2 else beside
        image = image[..., None] if image.ndim == 2 else image
        results[_DTYPE] = image.dtype, image.shape[2]
        dtype = image.dtype if beside.dtype == image.dtype else np.dtype(np.float32)
        results['img'] = np.concatenate([image.astype(dtype), beside.astype(dtype)], axis=2)
        return results

    def __repr__(self) -> str:
        return f'LoadImageBeside(key={self.key!r}, color_type={self.color_type!r})'


@TRANSFORMS.register_module()
class SplitImageBeside:
    """Takes apart what :class:`LoadImageBeside` has put together: ``img``, and the field ``key`` as an array (H, W, C).

    Args:
        key: name of the field.

    Raises:
        ValueError: (when it runs) there is nothing to take apart.
    """

    def __init__(self, key: str):
        self.key = key

    def __call__(self, results: Dict[str, Any]) -> Dict[str, Any]:
        if _DTYPE not in results:
            raise ValueError(f'SplitImageBeside: no LoadImageBeside(key={self.key!r}) stands before it')
        dtype, channels = results.pop(_DTYPE)
        both = results['img']
        image, beside = both[..., :channels], both[..., channels:]
        if image.dtype != dtype and np.issubdtype(dtype, np.integer):
            limits = np.iinfo(dtype)
            image = np.clip(np.rint(image), limits.min, limits.max)
        results['img'] = np.ascontiguousarray(image.astype(dtype))
        results[self.key] = np.ascontiguousarray(beside)
        return results

    def __repr__(self) -> str:
        return f'SplitImageBeside(key={self.key!r})'
