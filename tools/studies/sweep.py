#!/usr/bin/env python3
"""Try distillation on every family of the installed hosts: one config of every folder of their ``.mim/configs``.

    python tools/studies/sweep.py                              all; writes tests/compat.json and configs/README.md
    python tools/studies/sweep.py --only mmdet/gfl mmseg/fcn   some; prints only (--write merges them)
    make sweep STACK=yolo ARGS="--only mmyolo --write"         a host that needs an environment of its own
    python tools/studies/sweep.py --render                     the table of configs/README.md from tests/compat.json
    python tools/studies/sweep.py --only mmdet/convnext --write --extra DIR    with packages that are in DIR alone

The smallest config of each folder is taken as it is except for: random weights, batches of two random small images
with boxes, masks or maps, BN where it has SyncBN, and no other custom hooks.  A second copy with other random weights
teaches it in a real Runner for two optimizer steps, by three losses:

  neck      PKDLoss at '@neck' (the pixel decoder of mask transformers, the backbone where there is neither)
  backbone  FitNetLoss at '@backbone', through a trained 1x1 convolution
  logits    SigmoidKDLoss or SoftmaxKDLoss at '@logits', where the head has dense class logits

A kind is 'ok' when the loss was attached, stayed finite, reached the student with a gradient, trained its adapter, left
every key of the student as it was and no trace after the training.  Anything else is the reason in words.
"""

import argparse
import copy
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools' / 'studies'), str(ROOT / 'tests' / 'helpers')]

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from sweep_families import HOSTS, families, import_hosts, in_order, versions  # noqa: E402
from sweep_models import fill_trident, own_shapes, shrunk  # noqa: E402
from sweep_table import KINDS, NOT_THERE, beside, render, summary  # noqa: E402

from kd_mm.engine.distiller import Distiller  # noqa: E402
from kd_mm.engine.hook import DistillHook  # noqa: E402
from kd_mm.hosts.files import read_file  # noqa: E402
from kd_mm.hosts.models import build_model, class_names, start_counters  # noqa: E402
from kd_mm.hosts.packages import PackageError  # noqa: E402
from kd_mm.hosts.synthetic import synthetic_batch  # noqa: E402
from kd_mm.hosts.table import SEGMENTATION, host_of  # noqa: E402
from kd_mm.lab.models import scope_of  # noqa: E402

RESULTS = ROOT / 'tests' / 'compat.json'
TABLE = ROOT / 'configs' / 'README.md'
#: What a family did, as it stands in the file of results; losses by name.
Record = Dict[str, Any]
Losses = Dict[str, Dict[str, Any]]
LIMIT = 240  # seconds of processor time a family


# ------------------------------------------------------------------------------------------------------ one family


class Images(torch.utils.data.Dataset):
    """The samples of one synthetic batch."""

    def __init__(self, batch: Dict[str, Any], classes: Sequence[str]) -> None:
        self.batch, self.metainfo = batch, dict(classes=classes)

    def __len__(self) -> int:
        return len(self.batch['inputs'])

    def __getitem__(self, index: int) -> Dict[str, Any]:
        return {key: copy.deepcopy(value[index]) for key, value in self.batch.items()}


def distiller_of(runner: Runner) -> Distiller:
    hook = next(hook for hook in runner.hooks if isinstance(hook, DistillHook))
    assert hook.distiller is not None
    return hook.distiller


class Observer(Hook):
    """What the losses were in each step, and the gradient of each on the student in the first."""

    priority = 'VERY_LOW'

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.values: List[Dict[str, float]] = []
        self.gradients: Dict[str, float] = {}
        self.first: Dict[str, torch.Tensor] = {}

    def before_train(self, runner: Runner) -> None:
        self.first = {name: value.detach().clone() for name, value in distiller_of(runner).named_parameters()}
        model, parse = runner.model, runner.model.parse_losses
        # Predictors that begin at 0 (YOLOv6, PPYOLOE) say the same in both models, which is no difference to learn.
        for parameter in model.parameters():
            if parameter.dim() > 1 and not bool(parameter.detach().any()):
                torch.nn.init.normal_(parameter, std=0.01)

        def parse_losses(losses: Dict[str, Any]) -> Any:
            parameters = [p for p in model.parameters() if p.requires_grad]
            for name in self.names if not self.gradients else ():
                found = torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True)
                self.gradients[name] = sum(float(part.abs().sum()) for part in found if part is not None)
            return parse(losses)

        object.__setattr__(model, 'parse_losses', parse_losses)
        self.restore = lambda: object.__delattr__(model, 'parse_losses')

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.values.append({name: float(value) for name, value in outputs.items()})

    def after_train(self, runner: Runner) -> None:
        self.restore()


def losses_for(host: str) -> Losses:
    logits = dict(type='SoftmaxKDLoss' if HOSTS[host].task == SEGMENTATION else 'SigmoidKDLoss')
    return {
        'loss_kd_neck': dict(type='PKDLoss', at='@neck'),
        'loss_kd_backbone': dict(type='FitNetLoss', at='@backbone', adapter=dict(type='ConvAdapter', always=True)),
        'loss_kd_logits': dict(at='@logits', **logits),
    }


def label_all(batch: Dict[str, Any]) -> bool:
    """Give ignored pixels a label; whether there were any."""
    maps = [sample.gt_sem_seg.data for sample in batch['data_samples']
            if 'gt_sem_seg' in sample and 'data' in sample.gt_sem_seg]
    found = any(bool((labels == 255).any()) for labels in maps)
    for labels in maps:
        labels[labels == 255] = 0
    return found


def collate(model: Any, items: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """A batch as the host's own loader makes it."""
    inputs, samples = ([item[key] for item in items] for key in ('inputs', 'data_samples'))
    host = host_of(model)
    if host is not None and host.batch is not None:
        return host.batch(model, inputs, samples)
    return dict(inputs=inputs, data_samples=samples)


def usable_shape(model: Any) -> Tuple[Tuple[int, int], Dict[str, Any]]:
    """The smallest size that the student can be trained with; its own error if there is none.

    Models are trained a step without distillation first: what fails then is not ours.
    """
    error: Optional[Exception] = None
    start_counters()
    for shape in own_shapes(model):
        try:
            preprocessor = model.data_preprocessor
            if getattr(preprocessor, 'size', None) is not None:
                preprocessor.size = shape  # mmseg pads to its crop size
            batch = synthetic_batch(model, 2, shape)
            model.train()
            for labels in ('as they are', 'without ignored pixels'):
                try:
                    items = [{key: copy.deepcopy(batch[key][index]) for key in batch} for index in range(2)]
                    losses = model(**preprocessor(collate(model, items), True), mode='loss')
                    break
                except IndexError:  # PIDNet's loss of mmseg 1.2.2 looks up the label 255
                    if labels != 'as they are' or not label_all(batch):
                        raise
            total, _ = model.parse_losses(losses)
            if not math.isfinite(float(total)):
                raise ValueError('the loss of the plain model is not finite')
            return shape, batch
        except Exception as problem:  # models raise anything at sizes that they cannot take
            error = error or problem
    assert error is not None  # there is at least one shape
    raise error


def try_family(path: Path, host: str) -> Record:
    """Distil one config for two steps; the record of it."""
    begin = time.time()
    try:
        cfg = read_file(path, f'the config {path}')
    except PackageError as error:
        return dict(config=path.name, refused=shorten(str(error).replace(f'{path}', 'it').removeprefix('the config ')))
    cfg.default_scope = cfg.get('default_scope') or host
    small = shrunk(cfg)
    if 'Trident' in str(small.model.get('backbone', {}).get('type')):
        fill_trident()
    record = dict(config=path.name, model=small.model['type'], kinds={})
    with scope_of(small):
        torch.manual_seed(0)
        try:
            model = build_model(small, host)
            model.init_weights()
        except Exception as error:
            return dict(record, refused=f'does not build: {describe(error)}')
        record['parts'] = parts_of(model)
        record['parameters'] = sum(p.numel() for p in model.parameters())
        try:
            shape, batch = usable_shape(model)
        except Exception as error:
            return dict(record, refused=f'the plain model does not train: {describe(error)}')
        record['shape'] = list(shape)
        keys = list(model.state_dict())
        losses = losses_for(host)
        while losses:
            problems = distil(small, batch, losses, record, keys)
            if problems is None:
                break
            for name in list(losses):
                mine = [text for text in problems if text.startswith(name)]
                if mine or len(losses) == 1:
                    record['kinds'][name.removeprefix('loss_kd_')] = (
                        NOT_THERE if any(NOT_THERE in text for text in mine) else shorten(' '.join(mine or problems)))
                    del losses[name]
            if losses and not any(text.startswith(name) for text in problems for name in losses_for(host)):
                for name, loss in losses.items():  # nobody's problem in particular: each one alone
                    alone = distil(small, batch, {name: loss}, record, keys)
                    if alone is not None:
                        record['kinds'][name.removeprefix('loss_kd_')] = shorten(' '.join(alone))
                break
        record['seconds'] = round(time.time() - begin, 1)
    return record


def distil(cfg: Config, batch: Dict[str, Any], losses: Losses, record: Record,
           keys: Sequence[str]) -> Optional[List[str]]:
    """Two steps with these losses; None, or the problems that kept them from starting.

    Random weights of a deep model can have gradients that throw it far away in one step: where its features are not
    finite afterwards, Adam, whose steps are as small as its rate, shows what the losses can do.
    """
    problems = distil_once(cfg, batch, losses, record, keys, cfg.optim_wrapper)
    if problems is not None and any('is not finite at step 1' in text for text in problems):
        gentle = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=1e-5))
        problems = distil_once(cfg, batch, losses, record, keys, gentle)
    return problems


def distil_once(cfg: Config, batch: Dict[str, Any], losses: Losses, record: Record, keys: Sequence[str],
                wrapper: Any) -> Optional[List[str]]:
    """Two steps with these losses and this optimizer."""
    model = build_model(cfg, cfg.default_scope)  # the Runner initialises it, after it has made the optimizer
    if getattr(model.data_preprocessor, 'size', None) is not None:
        model.data_preprocessor.size = tuple(record['shape'])
    observer = Observer(list(losses))
    entry = dict(type='kd_mm.DistillHook', teacher=dict(model=cfg.model.to_dict(), default_scope=cfg.default_scope),
                 teacher_ckpt='random', losses=losses, seed=1)
    wrapper = copy.deepcopy(wrapper)
    if str(wrapper.get('type', '')).startswith('Amp'):
        wrapper = dict(wrapper, type='OptimWrapper')
        for key in ('loss_scale', 'dtype'):
            wrapper.pop(key, None)
    # Random weights can have gradients whose norm is infinite: clipping would then set every one to 0.
    wrapper.pop('clip_grad', None)
    # Without it the first step of a deep model may end in weights that overflow.
    wrapper['optimizer'] = dict(wrapper['optimizer'], lr=0.01 * wrapper['optimizer']['lr'])
    with tempfile.TemporaryDirectory() as folder:
        name = f'sweep_{os.getpid()}_{time.time_ns()}'
        runner = Runner(
            model=model, work_dir=folder, experiment_name=name, default_scope=cfg.default_scope, log_level='ERROR',
            train_dataloader=dict(dataset=Images(batch, class_names(cfg) or ()), batch_size=2, num_workers=0,
                                  sampler=dict(type='DefaultSampler', shuffle=False),
                                  collate_fn=partial(collate, model)),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=2, val_interval=3), optim_wrapper=wrapper,
            custom_hooks=[entry, observer], default_hooks=dict(checkpoint=None, logger=None),
            visualizer=dict(type='Visualizer', name=name))
        try:
            runner.train()
        except Exception as error:
            detach(runner, model)
            found = getattr(error, 'found', None)
            if found is None and os.environ.get('KD_MM_SWEEP_TRACE'):
                traceback.print_exc()
            return found or [describe(error)]
    trained = {name: not torch.equal(value, observer.first[name])
               for name, value in distiller_of(runner).named_parameters()}
    for name in losses:
        values = [step[name] for step in observer.values]
        own = [changed for key, changed in trained.items() if f'.{name}.' in f'.{key}.']
        faults = [text for wrong, text in (
            (len(values) != 2 or not all(map(math.isfinite, values)), f'losses {values}'),
            (not observer.gradients.get(name), 'no gradient on the student'),
            (not all(own), f'{own.count(False)} of {len(own)} adapter parameters untrained'),
            (list(model.state_dict()) != keys, 'the keys of the student changed'),
            (bool(traces(model)), f'left behind: {", ".join(traces(model))}')) if wrong]
        record['kinds'][name.removeprefix('loss_kd_')] = '; '.join(faults) or 'ok'
    return None


def traces(model: torch.nn.Module) -> List[str]:
    """What a detached distiller must not leave: replaced methods and hooks."""
    found = [f'{name}.{key}' for name, module in model.named_modules() for key in vars(module)
             if getattr(vars(module)[key], '_kd_mm_tap', False)]
    found += [key for key in ('loss', 'forward', 'extract_feat', 'parse_losses') if key in vars(model)]
    return found + [str(hook) for hook in (*model._forward_hooks.values(), *model._forward_pre_hooks.values())
                    if hasattr(hook, '_kd_mm')]


def detach(runner: Runner, model: torch.nn.Module) -> None:
    for hook in runner.hooks:
        if isinstance(hook, DistillHook) and hook.distiller is not None:
            hook.distiller.detach()
    if 'parse_losses' in vars(model):
        object.__delattr__(model, 'parse_losses')


def parts_of(model: torch.nn.Module) -> Dict[str, str]:
    names = ('backbone', 'neck', 'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'panoptic_head', 'decode_head')
    found = {}
    for name in names:
        part = getattr(model, name, None)
        if isinstance(part, torch.nn.ModuleList):
            part = part[-1]
        if isinstance(part, torch.nn.Module):
            found[name] = type(part).__name__
    return found


def describe(error: BaseException) -> str:
    return shorten(f'{type(error).__name__}: {error}')


def shorten(text: object, width: int = 220) -> str:
    text = re.sub(r'/\S*site-packages/', '', ' '.join(str(text).split()))
    text = re.sub(r',? the current sys\.path is.*', '', text)
    # No path of this machine; what follows `https:/` is an address.
    text = re.sub(r'(?<![\w.])(?<!\w:/)/[\w.+~-]+(?:/[\w.+~-]+)+', '...', text)
    return text if len(text) <= width else text[:width - 3] + '...'


# ------------------------------------------------------------------------------------------------------- all of them


def isolated(function: Callable[..., Record], *arguments: Any, limit: int = LIMIT) -> Record:
    """Call in a forked process, so that a crash, a full memory or an endless loop stays its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        warnings.simplefilter('ignore')
        null = os.open(os.devnull, os.O_WRONLY)
        if not os.environ.get('KD_MM_SWEEP_TRACE'):
            os.dup2(null, 1)
            os.dup2(null, 2)
        signal.setitimer(signal.ITIMER_PROF, limit)  # processor time: a busy machine is nobody's fault
        try:
            result = function(*arguments)
        except BaseException as error:  # everything has to get to the parent
            result = dict(refused=f'failed: {describe(error)}')
        with os.fdopen(writer, 'w') as stream:
            json.dump(result, stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if text:
        return json.loads(text)
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return dict(refused=f'took more than {limit} s' if killed == signal.SIGPROF else f'the process died ({status})')


def try_candidates(name: str, configs: Sequence[Path]) -> Record:
    """The first config of a folder that builds and trains by itself."""
    host = name.split('/')[0]
    before: Dict[str, str] = {}
    first: Record = {}
    for path in configs[:6]:
        record = isolated(try_family, path, host)
        record.setdefault('config', path.name)
        if 'refused' not in record:
            return dict(record, before=before) if before else record
        first = first or record
        before[path.name] = record['refused']
    return first


def passed(record: Record) -> bool:
    return 'refused' not in record and all(value in ('ok', NOT_THERE) for value in record['kinds'].values())


def sweep(names: Sequence[str],
          keep: Callable[[Dict[str, Record]], None] = lambda results: None) -> Dict[str, Record]:
    results: Dict[str, Record] = {}
    todo = [item for item in families() if not names or any(
        item[0] == name or item[0].startswith(f'{name}/') for name in names)]
    for number, (name, configs, reason) in enumerate(todo, 1):
        results[name] = dict(left_out=reason) if reason else try_candidates(name, configs)
        record = results[name]
        text = record.get('left_out') or record.get('refused') or ', '.join(
            f'{kind} {record["kinds"].get(kind)}' for kind in KINDS)
        keep(results)  # an interrupted sweep has lost nothing
        print(f'[{number}/{len(todo)}] {name:34} {record.get("seconds", "")!s:>6} s  {text}', flush=True)
    return results


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', default=[], metavar='HOST/FOLDER', help='some families')
    parser.add_argument('--write', action='store_true', help='with --only: merge the results into the file')
    parser.add_argument('--render', action='store_true', help='only write the table again')
    parser.add_argument('--extra', metavar='DIR', help='folder of optional packages (pip install --target DIR); what '
                        'is found with them stands beside what is found without')
    args = parser.parse_args(argv)
    if args.extra:
        sys.path.append(args.extra)
    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not args.render:
        torch.set_num_threads(1)
        import_hosts()

        def keep(results: Dict[str, Record]) -> None:
            if not args.only or args.write:
                before = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}).get('families', {})
                known = beside(before, results) if args.extra else {**before, **results}
                data.update(versions={**data.get('versions', {}), **versions()},
                            families={name: known[name] for name in in_order(known)})
                RESULTS.write_text(json.dumps(data, indent=1) + '\n')

        found = sweep(args.only, keep)
        print(summary(found))
        if args.only and not args.write:
            return 0 if all(passed(record) or 'left_out' in record for record in found.values()) else 1
    TABLE.write_text(render(data))
    print(f'{RESULTS.relative_to(ROOT)} and {TABLE.relative_to(ROOT)} written')
    return 0 if all(passed(record) for record in data['families'].values()
                    if 'left_out' not in record and 'refused' not in record) else 1


if __name__ == '__main__':
    sys.exit(main())
