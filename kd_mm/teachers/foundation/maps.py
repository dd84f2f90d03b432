"""What all foundation models share: a backbone that gives maps, tokens without class and register tokens, the file."""

import importlib
from types import ModuleType
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from torch import Tensor, nn

from kd_mm.hosts import checkpoint as ckpt
from kd_mm.hosts.tokens import tokens_to_map
from kd_mm.ops.checks import whole
from kd_mm.teachers.plain import PlainTeacher
from kd_mm.teachers.spec import OWN, TeacherSpec
from kd_mm.teachers.view import View

#: Parameters that are one token, by the last part of their name; and those that are as many as their second dimension.
_ONE = ('cls_token', 'class_token', 'class_embedding', 'dist_token', 'distillation_token')
_SEVERAL = ('register_tokens', 'reg_token', 'storage_tokens')
#: Numbers by which a model says it itself.
_COUNTS = ('num_prefix_tokens', 'num_extra_tokens')


class Foundation(nn.Module):
    """A model that is its backbone.

    Args:
        backbone: images (N, 3, H, W) -> a tuple of maps (N, C, h, w).
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Any:
        return self.backbone(images)


def package(kind: str, name: str, install: str) -> ModuleType:
    """An optional package, imported.

    Raises:
        ValueError: it is not installed, or does not import; with the mend.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        raise ValueError(f'teacher type={kind!r} needs the package {missing}, which is not installed. '
                         f'Install it: pip install {install}') from error
    except Exception as error:  # what a broken package raises
        raise ValueError(
            f'teacher type={kind!r}: {name} cannot be imported: {type(error).__name__}: {error}. A torchvision that '
            'was built for another torch is the usual cause: install the one that belongs to yours, from where torch '
            'came from') from error


def prefix_tokens(model: nn.Module) -> int:
    """Tokens that a vision transformer puts before those of the picture, counted from its own attributes.

    A number that the model gives itself (timm's ``num_prefix_tokens``), else the class, distillation and register
    tokens among its parameters.

    Example:
        >>> import torch
        >>> model = nn.Module()
        >>> model.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        >>> model.register_tokens = nn.Parameter(torch.zeros(1, 4, 8))
        >>> prefix_tokens(model)
        5
    """
    for name in _COUNTS:
        count = getattr(model, name, None)
        if isinstance(count, int):
            return count
    found = 0
    for path, parameter in model.named_parameters():
        name = path.rpartition('.')[2]
        found += name in _ONE
        if name in _SEVERAL:
            found += parameter.shape[-2] if parameter.dim() > 1 else 1
    return found


def maps_of(values: Sequence[Tensor], images: Tensor, patch: Optional[Tuple[int, int]], prefix: int,
            name: str) -> Tuple[Tensor, ...]:
    """Outputs of a model as maps: (N, L, C) tokens lose their first ``prefix``, (N, C, H, W) stay.

    Raises:
        ValueError: the tokens are not one for each patch.

    Example:
        >>> import torch
        >>> maps, = maps_of([torch.zeros(1, 29, 8)], torch.zeros(1, 3, 56, 84), (14, 14), 5, 'a ViT')
        >>> maps.shape
        torch.Size([1, 8, 4, 6])
    """
    found = []
    for value in values:
        if value.dim() == 4:
            found.append(value)
            continue
        if value.dim() != 3 or patch is None:
            raise ValueError(f'{name} gives a tensor of shape {tuple(value.shape)}, which is neither a map (N, C, H, W)'
                             ' nor tokens (N, L, C) of a model that has a patch_size')
        grid = images.shape[-2] // patch[0], images.shape[-1] // patch[1]
        if value.shape[1] != grid[0] * grid[1] + prefix:
            raise ValueError(f'{name} gives {value.shape[1]} tokens for pictures of {images.shape[-2]}x'
                             f'{images.shape[-1]}: {grid[0]}x{grid[1]} patches and {prefix} tokens before them (class, '
                             f'registers) are {grid[0] * grid[1] + prefix}')
        found.append(tokens_to_map(value, grid))
    return tuple(found)


def pair_of(value: Any) -> Optional[Tuple[int, int]]:
    """A patch size as (height, width); None where there is none.

    Example:
        >>> pair_of(14), pair_of((16, 8)), pair_of(None)
        ((14, 14), (16, 8), None)
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(edge, int) for edge in value):
        return value[0], value[1]
    return None


def indices_of(owner: str, value: Any) -> Optional[List[int]]:
    """``out_indices``: one block or several, negative from the end; None if it is not given.

    Raises:
        ValueError: it is no list of whole numbers.
    """
    if value is None:
        return None
    entries = [value] if isinstance(value, int) else value
    if not isinstance(entries, (tuple, list)) or not entries:
        raise ValueError(f'{owner}: out_indices={value!r} must be a list of blocks, such as (5, 11) or (-1, )')
    return [whole(owner, 'out_indices', entry, None) for entry in entries]


def options_of(owner: str, value: Any) -> Dict[str, Any]:
    """``options``: what the package's own function is given besides.

    Raises:
        ValueError: it is no dict.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f'{owner}: options={value!r} is no dict of arguments of the model')
    return dict(value)


def need_file(spec: TeacherSpec, what: str, mend: str) -> None:
    """Refuse a foundation model without weights that the user has named.

    Raises:
        ValueError: there are none.
    """
    if spec.checkpoint is None or spec.checkpoint == OWN:
        raise ValueError(f"no weights for teacher {what}: kd_mm downloads nothing for it. Give teacher_ckpt='path' of "
                         f"a file (.pth, .safetensors). {mend} (teacher_ckpt='random' to test)")


def read_file(spec: TeacherSpec) -> Dict[str, Tensor]:
    """The weights of the file that the spec names."""
    content = ckpt.load(spec.checkpoint)
    state = ckpt.state_dict_of(content)
    if not state:
        raise ValueError(f'teacher checkpoint {spec.checkpoint} holds no weights; its entries are '
                         f'{", ".join(map(str, list(content)[:3]))}')
    return state


def fill(spec: TeacherSpec, model: nn.Module, state: Mapping[str, Tensor], classifier: Sequence[str]) -> List[str]:
    """Load weights strictly, but for those of a classifier, which a backbone does not have.

    Args:
        spec: its :attr:`~kd_mm.teachers.spec.TeacherSpec.strict`.
        model: the backbone.
        state: the weights of the file.
        classifier: first parts of keys that may be left over.

    Returns:
        Sentences for the log.

    Raises:
        ValueError: they do not fit.
    """
    own = model.state_dict()
    left = sorted({head for key in state for head in classifier
                   if key not in own and (key == head or f'.{key}.'.find(f'.{head}.') >= 0)})
    kept = {key: value for key, value in state.items()
            if key in own or not any(key == head or f'.{key}.'.find(f'.{head}.') >= 0 for head in left)}
    notes = spec.load(model, loaded=dict(state_dict=kept))
    if left:
        notes.append(f'teacher checkpoint {spec.checkpoint} has weights of {", ".join(left)} as well, which a backbone '
                     'does not have: they are left out')
    return notes


def make_teacher(spec: TeacherSpec, backbone: nn.Module, name: str, preprocess: Optional[Mapping[str, Any]],
                 own: Mapping[str, Any], multiple_of: Optional[Tuple[int, int]] = None,
                 size: Optional[Tuple[int, int]] = None, notes: Sequence[str] = ()) -> PlainTeacher:
    """The teacher around a backbone.

    Args:
        spec: what the config asks for.
        backbone: images -> a tuple of maps.
        name: for messages.
        preprocess: what the user says of its pictures; keys that he leaves out are as in ``own``.
        own: what the model says itself: ``mean``, ``std`` in units of 0..255, ``channels``.
        multiple_of: (height, width) of which the pictures must be multiples.
        size: of pictures, for a model that takes one size only.
        notes: for the log.
    """
    if preprocess is not None and not isinstance(preprocess, Mapping):
        raise ValueError(f'teacher {name}: preprocess={preprocess!r} is no dict')
    wanted = {**own, **(preprocess or {})}
    teacher = PlainTeacher(Foundation(backbone), spec.student, name, wanted, spec.input_key)
    if teacher.size is None:
        teacher.needs = View(size=size) if size is not None else View(multiple_of=multiple_of or (1, 1))
    teacher.notes += list(notes)
    return teacher
