"""Train a config of a host (mmdet, mmseg, ...), with or without distillation.

    kd-mm train configs/det/fgd/fgd_retinanet_r50_from_r101_2x_coco.py
    kd-mm train CONFIG --cfg-options data_root=/data/coco train_dataloader.batch_size=4

Several GPUs, here and on two machines (the second with NODE_RANK=1); without any GPU, processes over gloo:

    torchrun --nproc_per_node 8 -m kd_mm train CONFIG --launcher pytorch
    torchrun --nnodes 2 --node_rank 0 --nproc_per_node 8 --master_addr HOST -m kd_mm train CONFIG --launcher pytorch
    srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 kd-mm train CONFIG --launcher slurm
    mpirun -np 16 -x MASTER_ADDR=HOST kd-mm train CONFIG --launcher mpi

In a checkout tools/dist_train.sh and tools/slurm_train.sh do the same.

The hosts' own tools/train.py train the same configs.  This one knows all hosts, looks for the data before anything
is built, moves a whole data set by ``data_root=``, and never overwrites the checkpoints of an earlier run unasked.
"""

import argparse
import importlib.util
import os
import os.path as osp
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence, Set, Tuple

import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from kd_mm.engine.hook import folder_of
from kd_mm.hosts.checkpoint import allow_mmengine_checkpoints, load_file
from kd_mm.hosts.files import read_file
from kd_mm.hosts.models import class_names
from kd_mm.hosts.packages import lacking
from kd_mm.hosts.renamed import no_such_config
from kd_mm.hosts.table import host_of_config
from kd_mm.hosts.zoo import zoo_config
from kd_mm.lab.commands import REFUSALS, fail, option, words
from kd_mm.lab.configs import (
    Options,
    apply_options,
    faults,
    hook_entries,
    lost_weights,
    no_host,
    type_name,
    unusable_host,
)
from kd_mm.lab.data import empty_sets, evaluation_problems, is_empty
from kd_mm.lab.logs import last_checkpoint
from kd_mm.lab.models import build_student, scope_of
from kd_mm.lab.recipes import next_best
from kd_mm.ops.problems import ConfigProblems

#: What data sets and evaluators read besides pictures, below ``data_root``; all but the first are Open Images'.
FILES = ('ann_file', 'label_file', 'meta_file', 'hierarchy_file', 'image_level_ann_file')
CFG_OPTIONS_HELP = ('change settings of the config: KEY=VALUE ..., with dots for nested keys, KEY="[a,b]" for lists. '
                    'data_root=PATH moves every dataset and evaluator path that lies below the config\'s data_root')


def parse_args(argv: Optional[Sequence[str]] = None, prog: Optional[str] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, or kd_mm::NAME for one that we ship')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints. Default: the config\'s work_dir, else '
                        './work_dirs/ and the path of the config below its `configs` folder')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size')
    parser.add_argument('--resume', nargs='?', const='auto',
                        help='continue from this checkpoint; without a path from the latest one in the work dir')
    parser.add_argument('--overwrite', '--force', action='store_true',
                        help='start anew in a work dir that already has checkpoints')
    parser.add_argument('--score-teacher', action='store_true', help='evaluate the teacher on the validation data '
                        'before the first step')
    parser.add_argument('--score-images', type=int, metavar='N', help='the same on the first N images of the '
                        'validation data alone; the student is evaluated on them, too')
    add_shared_arguments(parser)
    return prepare_args(parser.parse_args(argv))


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that training and testing share."""
    parser.add_argument('--cfg-options', nargs='+', action=Options, help=CFG_OPTIONS_HELP)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                        help='what has started the processes: torchrun, srun, mpirun; see above')
    # torch.distributed.launch passes --local-rank since torch 2.0 and --local_rank before.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def prepare_args(args: argparse.Namespace) -> argparse.Namespace:
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def load_config(args: argparse.Namespace) -> Config:
    """The config of the command line, with its options applied, its host checked and its work dir set."""
    try:
        args.config = str(zoo_config(args.config)) if '::' in args.config else args.config
        if not osp.isfile(args.config):
            fail(no_such_config(args.config))
        cfg = read_file(args.config, f'the config {args.config}')
    except REFUSALS as error:
        fail(error)
    options = args.cfg_options or {}
    old_root = cfg.get('data_root')
    try:
        apply_options(cfg, options)
    except ValueError as error:
        fail(error)
    if 'data_root' in options and isinstance(old_root, str):
        move_data_root(cfg, old_root, str(options['data_root']))
    cfg.launcher = args.launcher
    check_host(cfg)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', relative_stem(args.config))
    return cfg


def relative_stem(config: str) -> str:
    """The path of a config below its ``configs`` folder, without suffix: two methods may share a file name."""
    path = Path(config).resolve().with_suffix('')
    parts = path.parts
    if 'configs' in parts[:-1]:
        return osp.join(*parts[len(parts) - parts[::-1].index('configs'):])
    return path.name


def check_host(cfg: Config) -> None:
    """The host of a config must be known and installed; mmengine itself imports what it needs of it."""
    found = host_of_config(cfg)
    if found is None:
        fail(f'the config {no_host(cfg)}')
    if found.note is not None:
        print(f'kd_mm: {found.note}')
    if importlib.util.find_spec(found.host.package) is None:
        fail(f'the config is for {found.host.package}, which is not installed. Install it: pip install '
             f'{found.host.index}')
    problem = unusable_host(cfg)
    if problem is not None:
        fail(f'the config {problem}')


def move_data_root(cfg: Config, old: str, new: str) -> None:
    """Replace the data root in every dataloader and evaluator.

    A config writes ``data_root = 'data/coco/'`` and uses the variable below; the value is long copied there when an
    option changes the variable, so the option alone would change nothing.
    """
    old = old.rstrip('/')

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            for key in value:
                value[key] = moved(value[key])
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(moved(item) for item in value)
        if isinstance(value, str) and (value.rstrip('/') == old or value.startswith(old + '/')):
            return osp.join(new, value[len(old):].lstrip('/'))
        return value

    for key in list(cfg.keys()):
        if key.endswith(('_dataloader', '_evaluator')):
            moved(cfg[key]) if isinstance(cfg[key], dict) else cfg.__setattr__(key, moved(cfg[key]))


def data_paths(section: Any, key: str) -> Iterator[Tuple[str, str]]:
    """Yield (config key, path) of every file and folder that a dataloader or evaluator reads.

    Paths are joined as mmengine's datasets do: ``ann_file`` and each ``data_prefix`` below ``data_root``.
    """
    if isinstance(section, (list, tuple)):
        for index, item in enumerate(section):
            yield from data_paths(item, f'{key}.{index}')
        return
    if not isinstance(section, dict):
        return
    if section.get('backend_args'):
        return  # not a local disk
    root = section.get('data_root') or ''
    if root:
        yield f'{key}.data_root', root
    for name in FILES:
        if isinstance(section.get(name), str) and section[name]:
            yield f'{key}.{name}', osp.join(root, section[name])
    prefixes = section.get('data_prefix')
    for name, prefix in (prefixes.items() if isinstance(prefixes, dict) else []):
        # Only joined to a root here: without one, a prefix may be part of a path inside the annotation file.
        if prefix and root:
            yield f'{key}.data_prefix.{name}', osp.join(root, prefix)
    for name in ('dataset', 'datasets'):
        if name in section:
            yield from data_paths(section[name], f'{key}.{name}')


def check_data(cfg: Config, phases: Sequence[str]) -> None:
    """Report every missing data file and folder of ``phases`` ('train', 'val', 'test') at once."""
    missing: List[str] = []
    seen: Set[str] = set()
    for phase in phases:
        if cfg.get(f'{phase}_dataloader') is None:
            continue
        for kind in ('dataloader', 'evaluator'):
            for key, path in data_paths(cfg.get(f'{phase}_{kind}'), f'{phase}_{kind}'):
                if not isinstance(path, str) or '://' in path or osp.exists(path):
                    continue
                # What lies below a missing folder is missing too; name the folder alone.
                if not any(path == other or path.startswith(other.rstrip('/') + '/') for other in seen):
                    missing.append(f'  {key}: {path} (looked at {osp.abspath(path)})')
                seen.add(path)
    if not missing:
        stops = [text for phase in phases for text in evaluation_problems(cfg.get(f'{phase}_evaluator'), phase)]
        if stops:
            fail('; '.join(stops))
        return
    first = missing[0].split(':')[0].strip()
    mend = option(f'--cfg-options {first}=...')
    if isinstance(cfg.get('data_root'), str):
        mend = (f'{option("--cfg-options data_root=/path/to/data")} moves all paths below {cfg.data_root!r}; '
                f'--cfg-options {first}=... changes one')
    fail('the data of this config is not there:\n' + '\n'.join(missing) + f'\nDownload it, link it there, or: {mend}')


def use_amp(cfg: Config) -> None:
    kind = type_name(cfg.optim_wrapper) if 'type' in cfg.optim_wrapper else 'OptimWrapper'
    if kind == 'AmpOptimWrapper':
        return
    if kind != 'OptimWrapper':
        fail(f'--amp works with OptimWrapper; the config has optim_wrapper.type={kind!r}')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def use_auto_scale_lr(cfg: Config) -> None:
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        fail('--auto-scale-lr needs the batch size that the learning rate was chosen for: add '
             'auto_scale_lr = dict(base_batch_size=16) to the config')
    cfg.auto_scale_lr.enable = True


def check_folder(folder: str) -> None:
    """Refuse a work dir that cannot be written, before anything is built."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f'the work dir {folder} cannot be written: {error}. Give another one with --work-dir')


def check_state(path: str) -> None:
    """Refuse a file from which no training can go on, in words of ours: the host fails in the middle of loading it."""
    try:
        content = load_file(path)
    except REFUSALS as error:
        fail(f'--resume: {words(error)}')
    if not hasattr(content.get('meta'), 'get') or 'iter' not in content['meta'] or 'state_dict' not in content:
        fail(f'--resume: {path} holds {", ".join(map(str, content)) or "nothing"}, not the state of a training. To '
             f'start from its weights: --cfg-options load_from={path}')


def set_start(cfg: Config, resume: Optional[str], overwrite: bool) -> None:
    """Where training starts from; refuse to mix a new run into the checkpoints of an old one."""
    if resume is not None and resume != 'auto':
        if '://' not in resume and not osp.isfile(resume):
            fail(f'--resume: no such checkpoint: {resume}')
        if '://' not in resume:
            check_state(resume)
        cfg.resume, cfg.load_from = True, resume
        return
    saved = sorted(Path(cfg.work_dir).glob('*.pth')) if osp.isdir(cfg.work_dir) else []
    if resume == 'auto':
        # Without a checkpoint to resume from, the config's own load_from stays in force.
        latest = last_checkpoint(cfg.work_dir, noted=True)
        if latest is not None:
            cfg.resume, cfg.load_from = True, latest
        return
    if cfg.get('resume'):
        return
    if saved and not overwrite and os.environ.get('RANK', '0') == '0':
        # A run that fails half-way would otherwise leave a mixture of its own and the older checkpoints.
        fail(f'{cfg.work_dir} already has checkpoints ({", ".join(path.name for path in saved[:3])}'
             f'{", ..." if len(saved) > 3 else ""}). Continue with --resume, choose another --work-dir, or start anew '
             'there with --overwrite')


#: Launcher -> variable of torch -> the one that the launcher sets.
RANKS = dict(
    pytorch=dict(RANK='RANK', WORLD_SIZE='WORLD_SIZE', LOCAL_RANK='LOCAL_RANK'),
    slurm=dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID'),
    mpi=dict(RANK='OMPI_COMM_WORLD_RANK', WORLD_SIZE='OMPI_COMM_WORLD_SIZE', LOCAL_RANK='OMPI_COMM_WORLD_LOCAL_RANK'))
STARTED_BY = dict(pytorch='torchrun --nproc_per_node N -m kd_mm train CONFIG --launcher pytorch',
                  slurm='srun --ntasks-per-node N kd-mm train CONFIG --launcher slurm',
                  mpi='mpirun -np N -x MASTER_ADDR=HOST kd-mm train CONFIG --launcher mpi')


def set_ranks(launcher: str) -> None:
    """Say in torch's variables which process this is, as the launcher has said it in its own."""
    if launcher == 'none':
        return
    names = dict(RANKS[launcher], **({'MASTER_ADDR': 'MASTER_ADDR'} if launcher == 'mpi' else {}))
    missing = [name for name in names.values() if name not in os.environ]
    if missing:
        fail(f'--launcher {launcher}: {", ".join(missing)} not set, so this process does not know which of them it is. '
             f'Start it by: {STARTED_BY[launcher]}')
    os.environ.update({key: os.environ[name] for key, name in names.items()})


def init_cpu_processes(cfg: Config) -> None:
    """Let a launcher work without a GPU, over gloo: left alone, mmengine sets CUDA devices and fails."""
    if cfg.launcher == 'none' or torch.cuda.is_available() or torch.distributed.is_initialized():
        return
    if cfg.launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
        found = subprocess.getoutput(f'scontrol show hostname {os.environ.get("SLURM_NODELIST", "")} | head -n1')
        os.environ['MASTER_ADDR'] = found.strip()
    os.environ.setdefault('MASTER_PORT', '29500')
    torch.distributed.init_process_group('gloo')
    if 'runner_type' in cfg:
        strategy = cfg.setdefault('strategy', dict(type='DDPStrategy'))
        if strategy.get('type') in ('DDPStrategy', 'mmengine._strategy.DDPStrategy'):
            strategy.setdefault('model_wrapper', dict(
                type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False))
    elif cfg.get('model_wrapper_cfg') is None:
        # mmengine's own choice but for device_ids, which on a CPU must be none.
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
                                     find_unused_parameters=cfg.get('find_unused_parameters', False))


def end_processes() -> None:
    """Leave the process group together, at the end of a run that went well.

    A process that ends with the group alive aborts where another one's threads still use it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def check_processes(cfg: Config) -> None:
    """Refuse a strategy of several processes where nothing has started them: mmengine would stop without a mend."""
    kind = str((cfg.get('strategy') or {}).get('type')).split('.')[-1]
    if 'runner_type' in cfg and cfg.launcher == 'none' and kind in ('DDPStrategy', 'FSDPStrategy'):
        fail(f'strategy={kind!r} is for several processes, and this is one. Start them: torchrun --nproc_per_node N -m '
             "kd_mm train CONFIG --launcher pytorch; or take strategy=dict(type='SingleDeviceStrategy')")


def build_runner(cfg: Config) -> Any:
    return Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)


def train(cfg: Config, args: argparse.Namespace) -> None:
    """Train a config of :func:`load_config` as the flags say."""
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        use_auto_scale_lr(cfg)
    asked = args.score_teacher if args.score_images is None else args.score_images
    if asked is not False:
        entries = hook_entries(cfg)
        if not entries:
            flag = '--score-teacher' if args.score_images is None else '--score-images'
            fail(f'{flag}: the config has no kd_mm.DistillHook in custom_hooks, so there is no teacher')
        entries[0]['score_teacher'] = asked
    for part in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
        if not cfg.get(part):
            fail(f'{args.config} has no {part}: a config without data or schedule cannot be trained. Inherit from a '
                 "whole one of the host, such as 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'")
    found = faults(cfg)
    if found:
        fail('\n'.join(found))
    check_processes(cfg)
    check_data(cfg, phases(cfg))
    check_folder(cfg.work_dir)
    set_ranks(cfg.launcher)
    set_start(cfg, args.resume, args.overwrite)
    lost = [] if cfg.get('resume') else lost_weights(cfg)
    if lost:
        fail('\n'.join(lost))
    allow_mmengine_checkpoints()
    init_cpu_processes(cfg)
    try:
        build_runner(cfg).train()
    except ImportError as error:
        package = lacking(error)
        if package is None:
            raise
        fail(f'{args.config}: {package}')
    except ConfigProblems as problems:  # of the distillation, told before the first step
        fail(f'{problems}{instead(cfg, problems.found)}')
    except ValueError as error:
        if is_empty(error):
            fail('; '.join(empty_sets(cfg, phases(cfg))) or error)
        if not (cfg.get('resume') and 'parameter group' in str(error)):
            raise
        fail(f'the optimizer in the checkpoint to resume from does not fit this config ({error}): that of a '
             'distillation with adapters has a group of parameters more. Resume with the config it was written by, or '
             'start from its weights: load_from in place of resume')


def instead(cfg: Config, problems: Sequence[str]) -> str:
    """What would run for the pair of a config of which a loss was refused; '' where that is not known."""
    entries = hook_entries(cfg)
    if not entries or not any(text.startswith('loss_') for text in problems):
        return ''
    try:
        with scope_of(cfg):
            found = next_best(build_student(cfg), entries[0], problems, cfg.get('default_scope'), folder_of(cfg),
                              class_names(cfg))
    except Exception:  # models raise anything, and the problems are what is to be told
        return ''
    return '' if found is None else f'\n{found[0].upper()}{found[1:]}'


def phases(cfg: Config) -> Sequence[str]:
    """The phases whose data a training reads."""
    return ('train', 'val') if cfg.get('val_cfg') is not None else ('train', )


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    train(load_config(args), args)
    end_processes()
