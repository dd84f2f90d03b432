"""Write the plain student of a distilled checkpoint, and prove that the stock config loads it strictly.

    kd-mm export work_dirs/.../epoch_24.pth student.pth
    kd-mm export CKPT OUT --config CONFIG
    kd-mm export student.pth --onnx student.onnx --check IMAGES

Kept: the weights and what describes them (classes, config, epoch).  Dropped: optimizer, schedulers, logs, the weights
that an EMA hook keeps aside, and the adapters under the side key ``kd_mm``.  The stored config loses its distillation
hook, so that it runs without kd_mm.

With --onnx the network of the plain student is written as ONNX, and with --check onnxruntime and torch predict the same
images (docs/deploy.md).
"""

import argparse
import copy
import os
import os.path as osp
import tempfile
from typing import Any, Dict, List, Optional, Sequence

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import get_object_from_string

from kd_mm.hosts import deployed
from kd_mm.hosts.checkpoint import load_file, state_dict_of
from kd_mm.hosts.files import read_file
from kd_mm.hosts.models import scope_of_config
from kd_mm.hosts.pictures import check_readable, find_pictures
from kd_mm.hosts.renamed import no_such_config
from kd_mm.lab.commands import REFUSALS, fail
from kd_mm.lab.models import scope_of
from kd_mm.lab.onnx_export import OPSET, OPSETS
from kd_mm.lab.onnx_export import export as export_onnx
from kd_mm.lab.onnx_parts import wanted_parts
from kd_mm.lab.onnx_run import compare, default_size
from kd_mm.ops.words import count

#: Entries of ``meta`` that describe the weights and not the run that made them.
META = ('dataset_meta', 'epoch', 'iter', 'experiment_name', 'time', 'mmengine_version')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='checkpoint written by a training run')
    parser.add_argument('out', nargs='?', help='file to write; not needed for --onnx of what was exported before')
    parser.add_argument('--config', help='config of the student. Default: the one stored in the checkpoint')
    parser.add_argument('--overwrite', '--force', action='store_true', help='write over files that exist')
    onnx = parser.add_argument_group('ONNX')
    onnx.add_argument('--onnx', metavar='FILE', help='write the network as ONNX, too; needs pip install onnx '
                      'onnxruntime')
    onnx.add_argument('--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'), help='of the images of the network. '
                      "Default: that of the config's test pipeline")
    onnx.add_argument('--opset', type=int, default=OPSET, help='of the file. Default: %(default)s')
    onnx.add_argument('--check', metavar='IMAGES', help='an image or a folder: predict with onnxruntime and with torch '
                      'and compare')
    onnx.add_argument('--images', type=int, default=16, help='at most so many images of --check. Default: %(default)s')
    args = parser.parse_args(argv)
    if not args.onnx and (args.check or args.size):
        parser.error('--check and --size are about the file of --onnx: give that one, too')
    if not args.onnx and not args.out:
        parser.error('give OUT, the file to write, or --onnx FILE')
    if not OPSETS[0] <= args.opset <= OPSETS[1]:
        parser.error(f'--opset must be within {OPSETS[0]} and {OPSETS[1]}; {OPSET} fits most runtimes')
    if args.images < 1:
        parser.error('--images must be at least 1')
    return args


def student_config(path: Optional[str], meta: Dict[str, Any]) -> Config:
    """The student's config, without the distillation hook."""
    if path is not None:
        if not osp.isfile(path):
            fail(no_such_config(path))
        try:
            cfg = read_file(path, f'--config {path}')
        except REFUSALS as error:
            fail(error)
    elif isinstance(meta.get('cfg'), str):
        try:
            cfg = Config.fromstring(meta['cfg'], '.py')
        except Exception as error:
            fail(f'the config stored in the checkpoint cannot be read ({error}). Give it with --config')
    else:
        fail('the checkpoint stores no config. Give it with --config')
    if not cfg.get('model'):
        fail(f'{path or "the stored config"} has no `model`. Give the config of the student with --config')
    cfg = Config(findable(cfg.to_dict()))
    if cfg.get('custom_hooks'):
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks if not is_ours(hook)]
    if cfg.get('default_hooks'):
        cfg.default_hooks = {name: hook for name, hook in cfg.default_hooks.items() if not is_ours(hook)}
    return cfg


def is_ours(hook: Any) -> bool:
    """Whether the type of a hook is from kd_mm."""
    return hasattr(hook, 'get') and str(hook.get('type', '')).startswith('kd_mm.')


def findable(value: Any) -> Any:
    """A config with classes as text, all of which the registries find.

    In a new-style config a class becomes the path of its module, and mmengine does not find one whose module has the
    name of a function of its package (``mmdet.models.losses.smooth_l1_loss``).
    """
    if isinstance(value, dict):
        kind = value.get('type')
        found = {key: findable(item) for key, item in value.items()}
        if isinstance(kind, str) and kind.count('.') > 1 and get_object_from_string(kind) is None:
            found['type'] = f'{kind.split(".")[0]}.{kind.split(".")[-1]}'
        return found
    return type(value)(map(findable, value)) if isinstance(value, (list, tuple)) else value


def build_student(cfg: Config) -> torch.nn.Module:
    """The stock model of a config, built by its host alone."""
    scope = scope_of_config(cfg) or 'mmengine'
    try:
        with DefaultScope.overwrite_default_scope(scope):
            return MODELS.build(copy.deepcopy(cfg.model))
    except (ImportError, KeyError) as error:
        fail(f'the model of the config cannot be built: {error}. Is {scope} installed?')


def check_strict(model: torch.nn.Module, state: Dict[str, torch.Tensor], source: str) -> None:
    """Load strictly, in the form that re-parametrised blocks have in ``state``, or say what does not fit."""
    deployed.take_form(model, state)
    own = model.state_dict()
    problems = [f'{len(keys)} {what} ({", ".join(keys[:5])}{", ..." if len(keys) > 5 else ""})' for what, keys in (
        ('missing', [key for key in own if key not in state]),
        ('left over', [key for key in state if key not in own]),
        ('of another shape', [key for key in own if key in state and own[key].shape != state[key].shape])) if keys]
    if problems:
        fail(f'the weights of {source} do not fit the model of the config: {"; ".join(problems)}. Give the config of '
             'the student with --config')
    model.load_state_dict(state, strict=True)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    check_names(args, [out for out in (args.out, args.onnx) if out])
    try:
        checkpoint = load_file(args.checkpoint)
    except REFUSALS as error:
        fail(error)

    meta = checkpoint.get('meta') or {}
    state = {key: value.detach().cpu().clone() for key, value in state_dict_of(checkpoint).items()
             if isinstance(value, torch.Tensor)}
    cfg = student_config(args.config, meta)
    model = build_student(cfg)
    check_strict(model, state, args.checkpoint)
    if args.onnx:
        images = before_onnx(args, model)
    if args.out:
        write_student(args, checkpoint, cfg, state, type(model).__name__)
    else:
        left = [key for key in checkpoint if key not in ('meta', 'state_dict')]
        if left:
            fail(f'{args.checkpoint} is no plain student: it still has {", ".join(left)}. Give OUT, where the plain '
                 'student is written first')
    if args.onnx:
        write_onnx(args, cfg, model, images, meta.get('dataset_meta') or {})


def check_names(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse files that cannot be written, or that must not be written over."""
    for index, out in enumerate(names):
        folder = osp.dirname(osp.abspath(out))
        if not osp.isdir(folder):
            fail(f'no such folder: {folder}')
        if osp.isdir(out):
            fail(f'{out} is a folder. Give the name of a file, such as {osp.join(out, "student.pth")}')
        if osp.abspath(out) in map(osp.abspath, names[:index]):
            fail(f'{out} is to be written twice. Give OUT and --onnx different names')
        if osp.exists(out) and osp.exists(args.checkpoint) and osp.samefile(out, args.checkpoint):
            fail(f'{out} is the checkpoint itself, which holds what a resume needs. Choose another name')
        if osp.exists(out) and not args.overwrite:
            fail(f'{out} exists. Choose another name, or write over it with --overwrite')
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            fail(f'{out} cannot be written: {error}. Choose another folder')


def before_onnx(args: argparse.Namespace, model: Any) -> List[str]:
    """Refuse what can be known before anything is written; the images of ``--check``."""
    try:
        check_names(args, [*filter(None, [args.out]), *(part.file for part in wanted_parts(model, args.onnx))])
        paths = pictures_of(args.check)[:args.images] if args.check else []
        if paths:
            check_readable(paths, args.check)
        return paths
    except ValueError as error:
        fail(error)


def write_student(args: argparse.Namespace, checkpoint: Dict[str, Any], cfg: Config, state: Dict[str, torch.Tensor],
                  name: str) -> None:
    """Write the plain student: its weights and what describes them."""
    meta, folder = checkpoint.get('meta') or {}, osp.dirname(osp.abspath(args.out))
    kept = {key: meta[key] for key in META if key in meta}
    exported = dict(meta=dict(kept, cfg=cfg.pretty_text), state_dict=state)

    # Written aside, read back and loaded before it takes its name: OUT is whole and right, or is not there.
    handle, temporary = tempfile.mkstemp(prefix='.export-', suffix='.pth', dir=folder)
    os.close(handle)
    try:
        torch.save(exported, temporary)
        check_strict(build_student(cfg), load_file(temporary)['state_dict'], 'the written file')
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, args.out)
    finally:
        if osp.exists(temporary):
            os.remove(temporary)
    dropped = [key for key in checkpoint if key not in ('meta', 'state_dict')]
    print(f'{args.out}: {len(state)} tensors, {osp.getsize(args.out) / 2**20:.1f} MiB '
          f'(was {osp.getsize(args.checkpoint) / 2**20:.1f}); loads strictly into {name}; '
          f'dropped {", ".join(dropped) or "nothing"}')


def write_onnx(args: argparse.Namespace, cfg: Config, model: Any, paths: Sequence[str],
               about: Dict[str, Any]) -> None:
    """Write the network of the plain student as ONNX; with ``--check`` compare what it predicts."""
    model.eval()
    try:
        with scope_of(cfg):
            size = tuple(args.size) if args.size else default_size(cfg, model)
            parts, gap = export_onnx(model, args.onnx, size, describe(model, about), args.opset)
            for part in parts:
                print(f'{part.file}: {osp.getsize(part.file) / 2**20:.1f} MiB, opset {args.opset}, '
                      f'{" and ".join(part.inputs)} to {count(len(part.outputs), "output")}, ends with {part.path}')
            print(f'onnxruntime computes what torch does, within {gap:.1g} of the largest value')
            found = compare(cfg, model, parts, paths, size) if paths else None
    except ValueError as error:
        fail(error)
    if found is None:
        return
    print(f'check at {size[0]}x{size[1]}: {found.text()}')
    if found.empty:
        fail(f'neither side finds anything in {args.check}, which shows nothing. Give images with objects')
    if found.problems:
        fail('\n  '.join([f'{count(len(found.problems), "difference")} between torch and onnxruntime:',
                          *found.problems[:10]]))


def describe(model: Any, about: Dict[str, Any]) -> Dict[str, Any]:
    """What a runtime must know to prepare an image, for the metadata of the file."""
    preprocessor = model.data_preprocessor
    found: Dict[str, Any] = {}
    if getattr(preprocessor, '_enable_normalize', False):
        found.update(mean=preprocessor.mean.flatten().tolist(), std=preprocessor.std.flatten().tolist())
    # mmengine's and mmseg's preprocessors call it by two names
    turned = any(getattr(preprocessor, name, False) for name in ('_channel_conversion', 'channel_conversion'))
    found['channels'] = 'RGB' if turned else 'BGR'
    if about.get('classes'):
        found['classes'] = list(about['classes'])
    return found


def pictures_of(path: str) -> List[str]:
    """An image, or those of a folder.

    Raises:
        ValueError: there is none.
    """
    return [path] if osp.isfile(path) else find_pictures(path)


def _umask() -> int:
    """The umask, which can only be read by setting it; mkstemp makes files that others cannot read."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
