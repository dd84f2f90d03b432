"""The teacher: resolve its config, load its weights strictly, freeze it, feed it what it expects, run just far enough.

A :class:`Teacher` is no ``nn.Module`` and never a sub-module of one, so that nothing initialises, saves, averages or
broadcasts it by accident.
"""

import copy
import inspect
import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, DefaultScope
from mmengine.registry import MODELS as ENGINE_MODELS
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from kd_mm import checkpoint as ckpt
from kd_mm import targets
from kd_mm.functional import resize
from kd_mm.modes import preserved_random_state
from kd_mm.swap import swapped
from kd_mm.synthetic import input_channels
from kd_mm.taps import StopForward, Tap
from kd_mm.types import KDBatch

RANDOM = 'random'
_TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation'}


def task_of(model: nn.Module) -> Optional[str]:
    """``'detection'``, ``'segmentation'`` or None, by the host that a model's class comes from."""
    for base in type(model).__mro__:
        host = base.__module__.split('.')[0]
        if host in _TASKS:
            return _TASKS[host]
    return None


def load_config(source: Any) -> Tuple[Config, str, Optional[str]]:
    """Config of a teacher, a name for messages, and the path of its file.

    Args:
        source: path of a config file, ``mmdet::`` or ``mmseg::`` name of an installed one, a config or a dict; a dict
            is a whole config (with ``model``) or that of the model alone (with ``type``).

    Raises:
        FileNotFoundError: no such file or installed config.
        ValueError: not a config of a model.
    """
    if isinstance(source, str):
        path = str(ckpt.zoo_config(source)) if '::' in source else os.path.expanduser(source)
        if not os.path.isfile(path):
            raise FileNotFoundError(f'teacher config {source!r} does not exist (looked at {os.path.abspath(path)})')
        cfg, name, found = Config.fromfile(path), source, path
    elif isinstance(source, (Config, dict)):
        content = source if isinstance(source, Config) else Config(copy.deepcopy(dict(source)))
        cfg = Config(dict(model=content.to_dict())) if 'type' in content and 'model' not in content else content
        name, found = f'the given {cfg.get("model", {}).get("type", "config")}', source.get('filename', None)
    else:
        raise ValueError(f'teacher={source!r} is neither a path, a config name such as '
                         "'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', nor a config dict")
    if not cfg.get('model') or 'type' not in cfg.model:
        raise ValueError(f'teacher config {name} has no `model` with a `type`')
    return cfg, name, found


def default_weights(path: Optional[str]) -> Optional[str]:
    """URL of the published weights of a teacher config; None if there are none.

    Not its ``load_from``, which is where its own training started.
    """
    return ckpt.zoo_weights(path) if path else None


def _without_pretrained(value: Any) -> Any:
    """A model config that asks for no download: the teacher's own checkpoint makes it needless."""
    if isinstance(value, dict):
        cleaned = {key: _without_pretrained(item) for key, item in value.items() if key != 'pretrained'}
        if isinstance(cleaned.get('init_cfg'), dict) and cleaned['init_cfg'].get('type') == 'Pretrained':
            cleaned['init_cfg'] = None
        return cleaned
    if isinstance(value, (list, tuple)):
        return type(value)(_without_pretrained(item) for item in value)
    return value


def build_model(cfg: Config, scope: Optional[str], pretrained: bool = False) -> Any:
    """Build the model of a config under its own scope, without pretrained weights unless they are asked for."""
    model_cfg = copy.deepcopy(cfg.model.to_dict() if hasattr(cfg.model, 'to_dict') else cfg.model)
    model_cfg = model_cfg if pretrained else _without_pretrained(model_cfg)
    if cfg.get('data_preprocessor') and 'data_preprocessor' not in model_cfg:
        model_cfg['data_preprocessor'] = copy.deepcopy(dict(cfg.data_preprocessor))
    scope = cfg.get('default_scope') or scope or 'mmengine'
    with DefaultScope.overwrite_default_scope(scope):
        # Two-stage detectors read their config by attribute (train_cfg.rpn).
        return ENGINE_MODELS.build(ConfigDict(model_cfg))


def load_weights(model: nn.Module, checkpoint: Dict[str, Any], source: Any, strict: bool = True) -> List[str]:
    """Load the weights of a checkpoint into ``model``, converted as the modules themselves convert older files.

    Of several sets in a file, and of keys below common prefixes (``module.``, ``teacher.``), those are taken with which
    most keys fit (:func:`kd_mm.checkpoint.best_fit`).

    Args:
        model: the network.
        checkpoint: as :func:`kd_mm.checkpoint.load` gives it, or a state dict.
        source: its path, for messages.
        strict: whether every key must fit. False leaves what does not fit as it was built.

    Returns:
        What was mapped or tolerated, as sentences; empty when the keys were the model's own.

    Raises:
        ValueError: keys are missing, left over or of another shape, and ``strict`` is true; or no key fits at all.
    """
    if strict not in (True, False):
        raise ValueError(f'teacher_strict={strict!r} must be True or False')
    own = model.state_dict()
    sets = ckpt.weight_sets(checkpoint)
    fit = ckpt.best_fit(own, sets)
    if fit is None:
        raise ValueError(f'teacher checkpoint {source} holds no weights; its entries are {_some(list(checkpoint))}. '
                         'Give a file of torch.save(dict(state_dict=model.state_dict()), path)')
    if fit.add:
        # Some models put prefixes on plain keys themselves (mmdet's semi-supervised ones), on more than one copy.
        before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in own.items()}
        plain = _load(model, sets[fit.where])
        if len(own) - len(plain.unset) > fit.fitting:
            fit = ckpt.Fit(fit.where, '', '', 0, 0)
        model.load_state_dict(before)
    everything = sets[fit.where]
    state = ckpt.strip(everything, fit.prefix, fit.add)
    found = _load(model, state)
    if own and all(key in found.unset for key in own if not key.endswith('num_batches_tracked')):
        raise ValueError(f'teacher checkpoint {source}: {_nothing_fits(model, own, everything, found)}')
    notes = _mapped(fit, len(everything) - len(state), found)
    faults = []
    if found.missing:
        faults.append(f'leaves {len(found.missing)} of {len(own)} keys unset ({_some(found.missing)})')
    if found.extra:
        faults.append(f'has {len(found.extra)} keys the model does not have ({_some(found.extra)})')
    if found.shapes:
        key = found.shapes[0]
        faults.append(f'has {len(found.shapes)} keys of another shape ({key}: file {found.sizes[key]}, model '
                      f'{tuple(own[key].shape)})')
    faults += found.errors
    whole = _whole_modules(model, own, found.unset)
    if whole:
        faults.append(f'gives no weights to whole modules, which stay as they were built, random as a rule: '
                      f'{", ".join(whole[:8])}{", ..." if len(whole) > 8 else ""}')
    if faults and strict:
        raise ValueError(f'teacher checkpoint {source} {"; ".join(notes + faults)}: wrong file for this config? '
                         'If it is meant so, set teacher_strict=False')
    return notes + faults


@dataclass
class _Loaded:
    """What became of the keys of a state dict that was loaded."""

    missing: List[str]
    extra: List[str]
    shapes: List[str]
    sizes: Dict[str, Any]
    #: second copies of the model's own keys under flat names
    copies: List[str]
    #: keys of the file that the modules renamed
    converted: List[str]
    errors: List[str]

    @property
    def unset(self) -> Set[str]:
        return {*self.missing, *self.shapes}


def _load(model: nn.Module, state: Dict[str, Tensor]) -> _Loaded:
    """Load what fits, after every module's own conversion of the keys (``_load_from_state_dict`` and its hooks).

    As ``nn.Module.load_state_dict``, but what does not fit is found by key, and every module sees all keys: older
    names may lie outside of the module that converts them (mmcv's ``conv2_offset`` beside ``conv2``).
    """
    versions = getattr(state, '_metadata', None) or {}
    converted, errors = OrderedDict(state), []  # type: ignore[var-annotated]
    missing: List[str] = []
    extra: List[str] = []

    def load(module: nn.Module, prefix: str) -> None:
        module._load_from_state_dict(converted, prefix, dict(versions.get(prefix[:-1], {})), False, missing, extra,
                                     errors)
        for name, child in module._modules.items():
            if child is not None:
                load(child, f'{prefix}{name}.')
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, _IncompatibleKeys(missing, extra))

    load(model, '')
    own = model.state_dict()
    # Batch norms of files before torch 0.4.1 count no batches, and nothing here reads the count.
    absent = [key for key in own if key not in converted and not key.endswith('num_batches_tracked')]
    sizes = {key: tuple(getattr(converted[key], 'shape', ())) for key in own if key in converted}
    # torch takes one number as a scalar.
    shapes = [key for key, size in sizes.items() if isinstance(own[key], Tensor)
              and size != tuple(own[key].shape) and (size, tuple(own[key].shape)) != ((1, ), ())]
    left = [key for key in converted if key not in own]
    flat = {key.replace('.', '_') for key in own if key in converted}
    copies = [key for key in left if '.' not in key and key.partition('_')[2] in flat]
    return _Loaded(
        absent, [key for key in left if key not in copies], shapes, sizes, copies,
        [key for key in state if key not in own and key not in converted],
        [error for error in errors if 'size mismatch' not in error])


def _mapped(fit: ckpt.Fit, outside: int, found: _Loaded) -> List[str]:
    """What was done to make a file's keys those of the model, in words."""
    notes = []
    usual = fit.where in ('', 'state_dict', 'model')
    if not usual or fit.prefix or fit.add or fit.rivals:
        done = (f'took the weights below the prefix {fit.prefix!r}' if fit.prefix else
                f'took the weights for {fit.add[:-1]!r} of the model' if fit.add else 'took the weights')
        places = {fit.where, *(rival.where for rival in fit.rivals)}
        if fit.where and (not usual or len(places) > 1):
            done += f' of its {fit.where!r}'
        if outside:
            done += f' and left {outside} other keys'
        equal = [rival for rival in fit.rivals if rival.fitting == fit.fitting]
        others = ', '.join(rival.name(len(places) > 1) for rival in (equal or fit.rivals)[:3])
        if equal:
            done += (f"; {others} would fit as well ('teacher' goes first, then what the file has first): to take "
                     'that, save it alone')
        elif others:
            done += f'; they fit best ({fit.fitting} keys, {fit.rivals[0].fitting} with {others})'
        notes.append(done)
    if found.copies:
        notes.append(f'has {len(found.copies)} second copies of weights, as an averaging hook writes them '
                     f'({_some(found.copies)}): the plain keys were taken')
    if found.converted:
        notes.append(f'has {len(found.converted)} keys under older names, which the model itself converts '
                     f'({_some(found.converted)})')
    return notes


def _nothing_fits(model: nn.Module, own: Dict[str, Any], state: Dict[str, Tensor], found: _Loaded) -> str:
    keys = list(state)
    if found.shapes:
        key = found.shapes[0]
        return (f'no key fits {type(model).__name__}, whatever teacher_strict says: the names are right, but all '
                f'shapes are others ({key}: file {found.sizes[key]}, model {tuple(own[key].shape)}). Give the config '
                'that the file was trained with')
    prefix = ckpt.common_prefix(keys)
    return (f'no key fits {type(model).__name__}, whatever teacher_strict says. Its keys '
            + (f'all begin with {prefix!r}' if prefix else 'have no common prefix')
            + f' ({_some(keys)}); the model has {_some(list(own))}. Give the file of this config, or save the weights '
            "under the model's names: torch.save(dict(state_dict={name: tensor}), path)")


def _whole_modules(model: nn.Module, own: Dict[str, Any], unset: Set[str]) -> List[str]:
    """The outermost modules of which no key was set."""
    names: List[str] = []
    for name, _ in model.named_modules():
        keys = [key for key in own if key.startswith(f'{name}.') and not key.endswith('num_batches_tracked')]
        if name and keys and unset.issuperset(keys) and not any(name.startswith(f'{outer}.') for outer in names):
            names.append(name)
    return names


def _some(keys: Sequence[Any]) -> str:
    return ', '.join(map(str, keys[:3])) + (', ...' if len(keys) > 3 else '')


def class_names(cfg: Optional[Config], checkpoint: Optional[Dict[str, Any]] = None) -> Optional[List[str]]:
    """Class names of a model: from the checkpoint's data set description, else from its config's data set."""
    meta = (checkpoint or {}).get('meta', {}).get('dataset_meta') or {}
    names = meta.get('classes') or meta.get('CLASSES') or (checkpoint or {}).get('meta', {}).get('CLASSES')
    dataset: Any = cfg.get('train_dataloader', {}).get('dataset') if cfg is not None else None
    while names is None and cfg is not None and hasattr(dataset, 'get'):
        names = (dataset.get('metainfo') or {}).get('classes')
        if names is None and dataset.get('type') and not dataset.get('dataset'):
            found = dataset['type']
            if isinstance(found, str):
                with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
                    found = registry.get(found)
            names = getattr(found, 'METAINFO', {}).get('classes')
        dataset = dataset.get('dataset')
    return list(names) if names and not isinstance(names, str) else None


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


class Teacher:
    """A frozen model in eval mode that is fed its own normalisation and stops after the last tap.

    Args:
        model: the network; every parameter is frozen and every module put into eval mode.
        student: the student, whose data preprocessor made the batches.
        name: for messages.
        classes: class names, if known.
    """

    def __init__(self, model: nn.Module, student: nn.Module, name: str = 'teacher',
                 classes: Optional[List[str]] = None):
        self.model: Any = model
        self.name, self.classes = name, classes
        self.notes: List[str] = []
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.eval()
        reference = next(student.parameters(), torch.zeros(()))
        model.to(reference.device)
        self._modules = list(model.modules())
        self._from = Normalisation(getattr(student, 'data_preprocessor', None)).to(reference.device)
        self._to = Normalisation(getattr(model, 'data_preprocessor', None)).to(reference.device)
        #: channels of the student's pictures and of the teacher's; None for a student without any layer
        self.channels = (input_channels(student) if next(student.parameters(), None) is not None else None,
                         input_channels(model))
        self.same_input = self._same_input()
        self._say_channels()
        #: (H, W) to which the batch is resized first; None leaves it as it is.
        self.size: Optional[Tuple[int, int]] = None
        self.calls: Dict[str, int] = {}
        self.runs = 0

    def _same_input(self) -> bool:
        own, wanted = self.channels
        return self._from == self._to and own in (None, wanted)

    def _say_channels(self) -> None:
        """Note a conversion between grey and colour.

        Raises:
            ValueError: there is no one right conversion.
        """
        own, wanted = self.channels
        if own in (None, wanted):
            return
        if (own, wanted) == (1, 3):
            how = 'the grey channel is given to it three times'
        elif (own, wanted) == (3, 1):
            order = 'RGB' if self._from.swapped else 'BGR'
            how = f'the batch, taken as {order}, becomes grey: 0.299 R + 0.587 G + 0.114 B'
        else:
            raise ValueError(
                f'teacher {self.name} takes pictures of {wanted} channels and the student ({own} channels) is given '
                'others, which have no one right conversion. Give a teacher with the bands of the student (in_channels '
                f'of its backbone and the mean and std of its data_preprocessor: {own})')
        self.notes.append(f'teacher {self.name} takes pictures of {wanted} channels and the student {own}: {how}')

    def start(self, resumed: bool) -> None:
        """Training begins: the student has its first weights. A fixed teacher has nothing to do."""

    def after_step(self, step: int, max_steps: int) -> None:
        """The student's optimizer has made step ``step`` of ``max_steps`` (0: unknown)."""

    def state(self) -> Dict[str, Any]:
        """What a resume needs; nothing for a fixed teacher."""
        return {}

    def load(self, state: Dict[str, Any]) -> None:
        """Restore :meth:`state`."""

    @classmethod
    def build(cls, source: Any, student: nn.Module, checkpoint: Optional[str] = None, strict: bool = True,
              scope: Optional[str] = None, seed: int = 0) -> 'Teacher':
        """Build a teacher from a config.

        Args:
            source: see :func:`load_config`; or a ready ``nn.Module``, taken with the weights it has.
            student: the student.
            checkpoint: path or URL of the weights; ``'random'`` for none; None for the published weights of an
                installed config.
            strict: whether the weights must fit exactly.
            scope: registry scope where the config names none: the student's.
            seed: of the weights of a random teacher.

        Raises:
            FileNotFoundError, ValueError: nothing there, or it does not fit; the message names the mend.
        """
        if isinstance(source, nn.Module):
            return cls(source, student, type(source).__name__)
        cfg, name, path = load_config(source)
        with preserved_random_state(seed):
            try:
                model = build_model(cfg, scope)
            except FileNotFoundError as error:
                raise ValueError(
                    f'teacher {name} cannot be built: its own config names a file that is not there: {error} (a '
                    f'relative path is looked for in {os.getcwd()}). Give a config that inherits from it with the '
                    'whole path') from error
            wanted, given = task_of(student), task_of(model)
            if wanted and given and wanted != given:
                raise ValueError(f'teacher {name} is a {given} model ({type(model).__name__}) and the student does '
                                 f'{wanted} ({type(student).__name__})')
            loaded: Optional[Dict[str, Any]] = None
            notes: List[str] = []
            if checkpoint is None:
                checkpoint = default_weights(path)
                if checkpoint is None:
                    raise ValueError(f'no weights for teacher {name}: it is not in the model index of an installed '
                                     "host. Give teacher_ckpt='path or URL' (or teacher_ckpt='random' to test)")
            if checkpoint == RANDOM:
                if hasattr(model, 'init_weights'):
                    model.init_weights()
            else:
                loaded = ckpt.load(checkpoint)
                notes = load_weights(model, loaded, checkpoint, strict)
        teacher = cls(model, student, name, class_names(cfg, loaded))
        teacher.notes += [f'teacher checkpoint {checkpoint} {note}' for note in notes]
        return teacher

    def renormalise(self, inputs: Tensor, batch: KDBatch) -> Tensor:
        """The student's batch as this teacher's own preprocessor would have made it.

        Raises:
            ValueError: the channels do not fit.
        """
        if self.same_input:
            return inputs
        channels = inputs.shape[1]
        wanted = self.channels[1] if self.channels[0] == channels else channels
        for side, norm, count in (('student', self._from, channels), ('teacher', self._to, wanted)):
            if norm.mean.numel() not in (1, count) or norm.std.numel() not in (1, count):
                raise ValueError(
                    f'teacher {self.name}: a batch of {channels} channels cannot be re-normalised: the {side} has '
                    f'{count} channels and its data preprocessor {norm.mean.numel()} means. Give both the same '
                    'data_preprocessor')
        source, target = self._from, self._to
        mean_from, std_from, mean_to, std_to = (
            part.to(inputs.dtype) for part in (source.mean, source.std, target.mean, target.std))
        image = inputs * std_from + mean_from
        if channels == 3 and wanted == 1:
            luma = inputs.new_tensor(_LUMA if source.swapped else _LUMA[::-1])
            image = (image * luma.view(3, 1, 1)).sum(1, keepdim=True)
        elif channels == 1 and wanted == 3:
            image = image.expand(-1, 3, -1, -1)
        elif channels == 3 and source.swapped != target.swapped:
            image = image.flip(1)  # bands of other numbers have no order of colours
        image = (image - mean_to) / std_to
        height, width = image.shape[-2:]
        for index, (h, w) in enumerate(targets.img_shapes(batch)):
            # Padding is written after normalisation, so it is no grey level that could be converted.
            if h < height:
                image[index, :, h:] = target.pad_value
            if w < width:
                image[index, :, :, w:] = target.pad_value
        return image

    def check_eval(self) -> None:
        """Put back any module that something switched to training mode."""
        for module in self._modules:
            if module.training:
                self.model.eval()
                return

    @torch.no_grad()
    def run(self, inputs: Tensor, data_samples: Any, taps: Sequence[Tap], batch: KDBatch, full: bool = False) -> None:
        """One forward pass that fills ``taps`` and stops when each has as many records as in the first pass.

        Args:
            inputs: the student's normalised batch (N, 3, Hin, Win).
            data_samples: for hosts whose forward reads image sizes from them.
            taps: the teacher taps of this step.
            batch: for the valid area of the images.
            full: run to the end (the first pass, which counts the calls).
        """
        self.check_eval()
        self.runs += 1
        images = self.renormalise(inputs, batch)
        if self.size is not None:
            images = resize(images, self.size)
        pending = {tap.path: self.calls.get(tap.path, 0) for tap in taps}
        counted = not full and all(pending.values())

        def keep(tap: Tap) -> None:
            pending[tap.path] -= 1
            if counted and not any(left > 0 for left in pending.values()):
                raise StopForward

        for tap in taps:
            tap.keep = keep
            tap.arm((images.shape[-2], images.shape[-1]))
        try:
            forward_tensor(self.model, images, data_samples, [tap.path for tap in taps])
        except StopForward:
            pass
        except Exception:
            # In the dry pass a model may fail after the last tap, where training will not run it at all.
            if not full or not all(tap.fired for tap in taps):
                raise
        finally:
            for tap in taps:
                tap.disarm()
                tap.keep = None
        if full:
            self.calls.update({tap.path: tap.calls for tap in taps})


def forward_tensor(model: Any, inputs: Tensor, data_samples: Any, paths: Sequence[str] = ()) -> Any:
    """The raw forward of a host model: features, neck and heads; no losses, no label assignment.

    mmseg's leaves out the auxiliary heads, so they are called here when a path asks for one.
    """
    auxiliary = getattr(model, 'auxiliary_head', None)
    wanted = [path for path in paths if path.startswith('auxiliary_head')] if isinstance(auxiliary, nn.Module) else []
    if task_of(model) is None:
        return model(inputs)
    if paths and _predicts_boxes_twice(model) and not any(path.startswith('mask_head') for path in paths):
        return model.bbox_head.forward(model.extract_feat(inputs))
    if not wanted and _ends_with_points(getattr(model, 'decode_head', None)):
        # The point head refines single points of a loss or a prediction; mmseg's raw forward gives it maps, and fails.
        return model.decode_head[0].forward(model.extract_feat(inputs))
    if not wanted and task_of(model) == 'segmentation' and _reads_samples(getattr(model, 'decode_head', None)):
        # mmseg's raw forward leaves the samples out, which mask transformers need for the size of the images.
        return model.decode_head.forward(model.extract_feat(inputs), _with_size(data_samples, inputs))
    if not wanted:
        return model(inputs, data_samples, mode='tensor')
    features: List[Any] = []
    output = None
    if len(wanted) == len(paths):
        features.append(model.extract_feat(inputs))
    else:
        original = model.extract_feat

        def extract_feat(images: Tensor) -> Any:
            features.append(original(images))
            return features[-1]

        # The auxiliary heads read the features of this very pass; a second one would fire the other taps twice.
        with swapped(model, 'extract_feat', extract_feat):
            output = model(inputs, data_samples, mode='tensor')
    heads: Any = auxiliary if isinstance(auxiliary, nn.ModuleList) else [auxiliary]
    for head in heads:
        head.forward(features[-1])
    return output


def _ends_with_points(head: Any) -> bool:
    return isinstance(head, nn.ModuleList) and any(cls.__name__ == 'PointHead' for cls in type(head[-1]).__mro__)


def _reads_samples(head: Any) -> bool:
    return isinstance(head, nn.Module) and 'batch_data_samples' in inspect.signature(type(head).forward).parameters


def _with_size(data_samples: Any, inputs: Tensor) -> List[Any]:
    """New data samples with the size of the padded batch in their meta information; the host's stay as they are."""
    size = {'batch_input_shape': tuple(inputs.shape[-2:])}
    return [sample.new(metainfo={**sample.metainfo, **size}) for sample in data_samples]


def _predicts_boxes_twice(model: Any) -> bool:
    """Whether the raw forward of mmdet calls the box head once more, to give the mask head its instances.

    YOLACT, CondInst and their like; in training the box head runs once, and taps count the calls.
    """
    return (isinstance(getattr(model, 'mask_head', None), nn.Module) and not hasattr(model, 'roi_head')
            and isinstance(getattr(model, 'bbox_head', None), nn.Module))


def inherit_weights(student: nn.Module, teacher: nn.Module, paths: Sequence[str], apply: bool = True) -> List[str]:
    """Copy the weights of ``paths`` (``'neck'``, ``'bbox_head'``) from the teacher into the student.

    Args:
        apply: False only looks.

    Returns:
        Problems, as sentences; nothing is copied when there is one.
    """
    problems, pairs = [], []
    for path in paths:
        modules = dict(student.named_modules()), dict(teacher.named_modules())
        if path not in modules[0] or path not in modules[1]:
            side = 'student' if path not in modules[0] else 'teacher'
            children = [name for name, _ in (student if side == 'student' else teacher).named_children()]
            problems.append(f'inherit: {side} has no module {path!r}; it has {", ".join(children)}')
            continue
        own, other = modules[0][path].state_dict(), modules[1][path].state_dict()
        different = [key for key in own if key not in other or own[key].shape != other[key].shape]
        different += [key for key in other if key not in own]
        if different:
            key = different[0]
            shapes = [tuple(state[key].shape) if key in state else 'missing' for state in (own, other)]
            problems.append(f'inherit: {path!r} differs between student and teacher in {len(different)} entries '
                            f'({key}: student {shapes[0]}, teacher {shapes[1]}); inherit modules that are equal only')
        pairs.append((modules[0][path], other))
    if apply and not problems:
        for module, state in pairs:
            module.load_state_dict(state)
    return problems
