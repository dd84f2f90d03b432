"""A plain folder of pictures as a data set, for training without labels."""

import os
from pathlib import Path
from typing import Any, Dict, List, Sequence

import cv2
from mmengine.dataset import Compose
from torch.utils.data import Dataset

from kd_mm.ops.words import count
from kd_mm.registry import DATASETS

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm')


def find_pictures(folder: str) -> List[str]:
    """Every picture below a folder, by its suffix, in the order of the paths.

    Raises:
        ValueError: there is no such folder, or none in it.
    """
    root = Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise ValueError(f'no such folder of pictures: {folder} (looked at {root.absolute()})')
    found = sorted(str(path) for path in root.rglob('*') if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f'the folder {folder} has no pictures, in it or below (looked for {", ".join(SUFFIXES)})')
    return found


def unreadable(paths: Sequence[str]) -> List[str]:
    """Those that are no pictures by their first bytes; nothing is decoded."""
    return [path for path in paths if not os.path.getsize(path) or not cv2.haveImageReader(path)]


def check_readable(paths: Sequence[str], where: str) -> None:
    """Raise a ValueError that names those that are no pictures; ``where`` they were looked for."""
    broken = unreadable(paths)
    if broken:
        raise ValueError(f'{count(len(broken), "file")} in {where} cannot be read as pictures, or not to their end: '
                         f'{", ".join(broken[:5])}{", ..." if len(broken) > 5 else ""}. Remove them or copy them again')


@DATASETS.register_module()
class ImageFolder(Dataset):
    """Every picture below a folder, without any label.

    Args:
        root: the folder.
        pipeline: transforms of the host, from one that loads ``img_path`` to one that packs.

    Raises:
        ValueError: no such folder, no pictures in it, or (when it is read) a file that is none, with its path.
    """

    def __init__(self, root: str, pipeline: Sequence[Any]):
        self.root, self.paths = root, find_pictures(root)
        self.pipeline = Compose(list(pipeline))
        self.metainfo: Dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        path = self.paths[index]
        try:
            return self.pipeline(dict(img_path=path, img_id=index, seg_fields=[]))
        except Exception as error:  # decoders raise anything
            if not unreadable([path]) and cv2.imread(path) is not None:
                raise
            raise ValueError(f'{path} cannot be read as a picture ({type(error).__name__}: {error}). Remove it or copy '
                             'it again') from error
