#!/usr/bin/env python3
"""All that depends on the device, in one command: promises, mixed precision, streams, memory, DDP, compile, cost.

    python tools/dev/gpu_check.py                    everything, on the first CUDA device (`make gpu`)
    python tools/dev/gpu_check.py --cpu              what does not need one; by itself where there is none
    python tools/dev/gpu_check.py --only stream ddp  some of it (--list names them)
    python tools/dev/gpu_check.py --configs configs/det/*/*.py   the cost of other configs; `all` for all that ship

It writes gpu_check.json and gpu_check.md (--out, default work_dirs/gpu_check).  Networks are the small ones of
configs/profile with random weights, pictures are random: nothing is read from a data set or fetched.  The costs are
those of shipped configs at full size (2 images of 800x1333, or 512x1024).  The exit status is 1 if a check failed.

On CUDA some kernels of torch add in no fixed order.  Where two plain runs differ, equal means: not further apart than
ten times as far as those two, and the table says so.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from mmengine.logging import MMLogger

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools' / 'dev')]

from gpu_ops import FALLBACKS, fallbacks, missing_ops  # noqa: E402
from gpu_place import DETECTOR, SEGMENTOR, Place, Skip, close, distance, must  # noqa: E402

from kd_mm.hosts.table import DETECTION, SEGMENTATION, host_of_config, packages  # noqa: E402
from kd_mm.lab.configs import hook_entries, read_config  # noqa: E402
from kd_mm.lab.cost import Bench, profile_config  # noqa: E402
from kd_mm.lab.meters import memory_rise  # noqa: E402
from kd_mm.lab.models import build_student, scope_of  # noqa: E402

warnings.filterwarnings('ignore', message='pkg_resources is deprecated')

#: Whose cost is measured unless told otherwise, one for each kind of model.
COSTS = ('configs/det/cwd/cwd_retinanet_r50_from_x101_2x_coco.py',
         'configs/det/fgd/fgd_retinanet_r50_from_r101_2x_coco.py',
         'configs/det/pkd/pkd_faster_rcnn_r50_from_r101_2x_coco.py',
         'configs/det/cwd/cwd_rtmdet_s_from_m_300e_coco.py',
         'configs/seg/cwd/cwd_pspnet_r18_from_r101_80k_cityscapes.py',
         'configs/seg/cwd/cwd_segformer_b0_from_b4_160k_cityscapes.py')
SHAPES = {DETECTION: (800, 1333), SEGMENTATION: (512, 1024)}


# ---------------------------------------------------------------------- the checks


def weight_zero(place: Place) -> Dict[str, Any]:
    """Weight 0 equals no hook: same seed, same losses, same weights."""
    cfg = place.config()
    hook_entries(cfg)[0]['losses']['loss_cwd']['loss_weight'] = 0.0
    plain, _ = place.train(cfg, distil=False)
    limit = 10 * distance(plain.model, place.train(cfg, distil=False)[0].model) if place.cuda else 0.0
    zero, _ = place.train(cfg)
    found = distance(plain.model, zero.model)
    must(found <= limit, f'weights differ by {found:.2g}, two plain runs by {limit / 10:.2g}')
    return dict(difference=found, limit=limit)


def plain_checkpoint(place: Place) -> Dict[str, Any]:
    """The checkpoint has the stock student's keys and loads strictly in a plain model."""
    cfg = place.config()
    hook_entries(cfg)[0]['losses']['loss_cwd']['adapter'] = dict(type='ConvAdapter', always=True)
    runner, losses = place.train(cfg)
    saved = torch.load(os.path.join(runner.work_dir, 'iter_3.pth'), map_location='cpu', weights_only=True)
    with scope_of(cfg):
        build_student(cfg).load_state_dict(saved['state_dict'], strict=True)
    must(bool(saved['kd_mm']['state_dict']), 'no adapters under the side key')
    must(all(step['loss_cwd'] > 0 for step in losses.steps), 'the distillation loss is 0')
    must(not any(module._forward_hooks for module in runner.model.modules()), 'hooks are left on the student')
    return dict(keys=len(saved['state_dict']))


def cut_and_resumed(place: Place) -> Dict[str, Any]:
    """A run that is cut after one step and resumed equals the one that was not cut."""
    cfg = place.config()
    hook_entries(cfg)[0]['losses']['loss_cwd']['adapter'] = dict(type='ConvAdapter', always=True)
    whole, _ = place.train(cfg)
    limit = 10 * distance(whole.model, place.train(cfg)[0].model) if place.cuda else 0.0
    again, losses = place.train(cfg, resume=True, load_from=os.path.join(whole.work_dir, 'iter_2.pth'))
    must(len(losses.steps) == 1, f'{len(losses.steps)} steps were made after the cut, not 1')
    found = distance(whole.model, again.model)
    must(found <= limit, f'weights differ by {found:.2g}, two whole runs by {limit / 10:.2g}')
    return dict(difference=found, limit=limit)


def fast_teacher(place: Place) -> Dict[str, Any]:
    """The teacher in its fast form gives the losses of the host's own forward."""
    found = {}
    for name in (DETECTOR, SEGMENTOR):
        exact, fast = (place.train(place.config(name, speed=speed), 2)[1] for speed in ('exact', 'auto'))
        found[Path(name).stem] = close(exact, fast, tolerance=1e-3)
    return found


def channels_last(place: Place) -> Dict[str, Any]:
    """A student in channels_last has the losses and gradients of a contiguous one."""
    bench = place.bench(DETECTOR, place.batch, place.shape)
    values = []
    bench.distiller.attach()
    try:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            bench.student.to(memory_format=memory_format)
            bench.student.zero_grad()
            inputs = bench.data['inputs'].contiguous(memory_format=memory_format)
            losses = bench.student(inputs, bench.fresh(), mode='loss')
            total, _ = bench.student.parse_losses(losses)
            total.backward()
            norm = torch.stack([parameter.grad.norm() for parameter in bench.student.parameters()
                                if parameter.grad is not None]).norm()
            values.append((float(total), float(losses['loss_cwd']), float(norm)))
    finally:
        bench.distiller.detach()
    found = max(abs(a - b) / abs(a) for a, b in zip(*values))
    must(found < 1e-3, f'total, distillation loss and gradient norm differ by {found:.2g}: {values}')
    return dict(difference=found)


def memory(place: Place) -> Dict[str, Any]:
    """A step needs the plain step's memory or the teacher's forward, whichever is more, plus what the taps keep."""
    bench = place.bench('configs/profile/retinanet_wide.py', place.batch, place.shape)
    device = place.device
    rises = {}
    for name, call in (('plain', bench.step), ('teacher', bench.fast_teacher), ('kd', bench.kd_step)):
        if name == 'kd':
            bench.distiller.attach()
        try:
            for _ in range(2):  # a tap copies in its first step, the teacher is checked
                call(bench.fresh())
            samples = bench.fresh()
            risen = memory_rise(partial(call, samples), device)
        finally:
            bench.distiller.detach()
        if risen is None:
            raise Skip('this torch does not tell what it allocates')
        rises[name] = risen
    held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for records in bench.record().records.values()
            for record in records.values() for tensor in record}
    extras = sum(parameter.numel() * parameter.element_size() for parameter in bench.distiller.parameters())
    limit = int(max(rises['plain'], rises['teacher']) + 2.5 * sum(held.values()) + extras)
    must(rises['kd'] <= limit, f'a step takes {rises["kd"]} bytes, and may take {limit}')
    return dict({f'{name}_mib': value / 2**20 for name, value in rises.items()}, limit_mib=limit / 2**20)


def _mixed(place: Place, dtype: str) -> Dict[str, Any]:
    if not place.cuda:
        raise Skip("mmengine's AmpOptimWrapper wants an accelerator")
    exact = place.train(place.config())[1]
    wrapper = dict(type='AmpOptimWrapper', dtype=dtype, optimizer=dict(type='SGD', lr=1e-3, momentum=0.9))
    if dtype == 'float16':
        wrapper['loss_scale'] = 'dynamic'
    cfg = place.config()
    hook_entries(cfg)[0]['losses']['loss_cwd']['adapter'] = dict(type='ConvAdapter', always=True)
    runner, losses = place.train(cfg, 4, optim_wrapper=wrapper)
    values = [value for step in losses.steps for value in step.values()]
    must(all(value == value and abs(value) != float('inf') for value in values), f'losses are not finite: {values}')
    scale = runner.optim_wrapper.loss_scaler.get_scale()
    exact_task, task = exact.steps[0]['loss_cls'], losses.steps[0]['loss_cls']
    must(abs(exact_task - task) < 0.05 * abs(exact_task), f'loss_cls is {task:.4g}, in full precision {exact_task:.4g}')
    return dict(loss_scale=scale, loss_cwd=losses.steps[0]['loss_cwd'])


def amp_fp16(place: Place) -> Dict[str, Any]:
    """AMP in float16 with a GradScaler trains, adapters included."""
    return _mixed(place, 'float16')


def amp_bf16(place: Place) -> Dict[str, Any]:
    """AMP in bfloat16 trains, adapters included."""
    return _mixed(place, 'bfloat16')


def stream(place: Place) -> Dict[str, Any]:
    """The teacher on a stream of its own gives the serial result."""
    if not place.cuda:
        raise Skip('streams are for CUDA')
    serial, beside = (place.train(place.config(speed=dict(fold=True, stream=on)), 6)[1] for on in (False, True))
    bench = place.bench(DETECTOR, 8, (256, 320))
    serial_ms = _step_ms(bench, place)
    bench.teacher.go(dict(fold=True, stream=True))
    bench.fast_teacher(bench.fresh())
    return dict(difference=close(serial, beside, 1e-3), serial_ms=serial_ms, stream_ms=_step_ms(bench, place))


def _step_ms(bench: Bench, place: Place) -> float:
    bench.distiller.attach()
    try:
        times = []
        for _ in range(3 + place.steps):
            samples = bench.fresh()
            times.append(bench._time(bench.kd_step, samples))
    finally:
        bench.distiller.detach()
    return sorted(times[3:])[place.steps // 2]


def compiled(place: Place) -> Dict[str, Any]:
    """A compiled train_step (`compile=True`) has the losses of the plain one."""
    if not place.cuda:
        raise Skip('the compiler for CPUs takes minutes')
    plain = place.train(place.config())[1]
    found = place.train(place.config(), compile=True)[1]
    return dict(difference=close(plain, found, 1e-2))


def ddp(place: Place) -> Dict[str, Any]:
    """Two devices over nccl: the weights of both are the same after some steps."""
    count = torch.cuda.device_count() if place.cuda else 0
    if count < 2:
        raise Skip(f'{count} CUDA device(s); tests/engine/test_ddp.py runs two processes over gloo')
    out = place.out / 'ddp'
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone',
               str(Path(__file__).resolve()), '--worker', '--out', str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    must(result.returncode == 0, result.stderr[-1500:])
    first, second = (torch.load(out / f'rank{rank}.pth', weights_only=True) for rank in (0, 1))
    for key, value in first.items():
        must('running_' in key or 'num_batches' in key or torch.equal(value, second[key]), f'{key} differs')
    return dict(tensors=len(first))


def worker(out: Path) -> None:
    """One rank of :func:`ddp`."""
    rank = int(os.environ['LOCAL_RANK'])
    torch.cuda.set_device(rank)
    place = Place(torch.device('cuda', rank), out)
    cfg = place.config()
    hook_entries(cfg)[0]['losses']['loss_cwd']['adapter'] = dict(type='ConvAdapter', always=True)
    with fallbacks(missing_ops(place.device)):
        runner, _ = place.train(cfg, launcher='pytorch', env_cfg=dict(dist_cfg=dict(backend='nccl')))
    state = {key: value.cpu() for key, value in runner.model.module.state_dict().items()}
    hook = next(hook for hook in runner.hooks if type(hook).__name__ == 'DistillHook')
    state.update({f'kd_mm.{key}': value.cpu() for key, value in hook.distiller.terms.state_dict().items()})
    torch.save(state, out / f'rank{rank}.pth')


def costs(place: Place) -> Dict[str, Any]:
    """What a step costs, for shipped configs at full size (on a CPU: the smallest model, small)."""
    names = place.costs or (COSTS if place.cuda else (DETECTOR, ))
    found: Dict[str, Any] = {}
    for name in names:
        try:
            cfg = read_config(str(ROOT / name))
            host = host_of_config(cfg)
            shape = SHAPES[host.host.task if host else DETECTION] if place.cuda else place.shape
            found[name] = profile_config(cfg, place.batch, shape, place.steps if place.cuda else 2, place.device)
        except Exception as error:  # a config that does not fit this device stops no other
            found[name] = dict(error=f'{type(error).__name__}: {error}'.split('\n')[0])
        if place.cuda:
            torch.cuda.empty_cache()
    must(any('error' not in result for result in found.values()), f'no config could be measured: {found}')
    return found


CHECKS: Dict[str, Callable[[Place], Dict[str, Any]]] = dict(
    weight_zero=weight_zero, plain_checkpoint=plain_checkpoint, cut_and_resumed=cut_and_resumed,
    fast_teacher=fast_teacher, channels_last=channels_last, memory=memory, amp_fp16=amp_fp16, amp_bf16=amp_bf16,
    stream=stream, compiled=compiled, ddp=ddp, costs=costs)


# ---------------------------------------------------------------------- running and telling


def run(names: Sequence[str], place: Place) -> List[Dict[str, Any]]:
    """The checks of these names, one after the other; what fails stops no other."""
    results = []
    for name in names:
        start = time.perf_counter()
        result: Dict[str, Any] = dict(name=name, what=(CHECKS[name].__doc__ or '').split('\n')[0])
        try:
            result.update(status='passed', numbers=CHECKS[name](place))
        except Skip as reason:
            result.update(status='skipped', why=str(reason))
        except Exception as error:  # whatever a device does not like
            result.update(status='failed', why=f'{type(error).__name__}: {error}'.strip()[:1500],
                          trace=traceback.format_exc()[-4000:])
        result['seconds'] = round(time.perf_counter() - start, 1)
        why = result.get('why', '')[:200]
        print(f'{result["status"]:<8} {name:<18} {result["seconds"]:>7.1f} s  {why}', flush=True)
        results.append(result)
    return results


def machine(device: torch.device) -> Dict[str, Any]:
    """What the numbers hold for."""
    cuda = device.type == 'cuda'
    found = dict(device=torch.cuda.get_device_name(device) if cuda else f'cpu, {torch.get_num_threads()} thread(s)',
                 devices=torch.cuda.device_count() if cuda else 0, torch=torch.__version__, cuda=torch.version.cuda,
                 cudnn=torch.backends.cudnn.version() if cuda else None, python=platform.python_version())
    for name in ('mmengine', 'mmcv', *packages()):
        try:
            found[name] = __import__(name).__version__
        except Exception:  # hosts assert versions while they are imported
            found[name] = None
    return found


def table(report: Dict[str, Any]) -> str:
    """The report as Markdown."""
    about = report['machine']
    lines = [f'# {about["device"]}', '', ', '.join(f'{key} {value}' for key, value in about.items()
                                                   if key != 'device' and value is not None) + '.', '']
    if not report['cuda']:
        lines += ['No CUDA device was used: these are the checks that do without, and no number here is that of a GPU.',
                  '']
    missing = report['missing_ops']
    lines += ['Operators of mmcv that do not run here: ' + ('; '.join(
        f'`{name}` ({FALLBACKS[name]} stands in)' if name in FALLBACKS else f'`{name}` (nothing stands in)'
        for name in missing) if missing else 'none') + '.', '', '| check | result | seconds | |', '|---|---|---|---|']
    for result in report['checks']:
        numbers = result.get('numbers') if result['name'] != 'costs' else None
        said = result.get('why') or ', '.join(
            f'{key} {value:.3g}' if isinstance(value, float) else f'{key} {value}' for key, value in
            (numbers or {}).items())
        said = said.split('\n')[0].replace('|', '/')[:200]
        lines.append(f'| {result["what"].rstrip(".")} | {result["status"]} | {result["seconds"]} | {said} |')
    found = next((result.get('numbers') for result in report['checks'] if result['name'] == 'costs'), None)
    if found:
        lines += ['', '| config | images | plain step ms | needed teacher ms | fast / needed | KD step ms | ratio | '
                  'memory plain MiB | with KD |', '|---|---|---|---|---|---|---|---|---|']
        for name, result in found.items():
            if 'error' in result:
                lines.append(f'| {name} | not measured: {result["error"].replace("|", "/")[:150]} | | | | | | | |')
                continue
            peak = [result['peak_memory'][key] for key in ('plain_bytes', 'kd_bytes')]
            texts = ['-' if value is None else f'{value / 2**20:.0f}' for value in peak]
            lines.append(
                f'| {name} | {result["batch"]} of {"x".join(map(str, result["input_shape"]))} | '
                f'{result["plain_step_ms"]:.1f} | {result["needed_teacher_ms"]:.1f} | {result["teacher_ratio"]:.2f} | '
                f'{result["kd_step_ms"]:.1f} | {result["ratio"]:.3f} | {texts[0]} | {texts[1]} |')
    return '\n'.join(lines) + '\n'


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cpu', action='store_true', help='on the CPU, also where there is a CUDA device')
    parser.add_argument('--only', nargs='+', choices=list(CHECKS), metavar='NAME', help='some of the checks')
    parser.add_argument('--list', action='store_true', help='name the checks and stop')
    parser.add_argument('--configs', nargs='+', default=[], metavar='FILE',
                        help='whose cost is measured; `all`: every shipped config. Default: one for each kind of model')
    parser.add_argument('--out', type=Path, default=ROOT / 'work_dirs' / 'gpu_check', help='folder of the results')
    parser.add_argument('--batch', type=int, default=2, help='images. Default: 2')
    parser.add_argument('--steps', type=int, default=10, help='measured rounds of a cost. Default: 10')
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    if args.list:
        for name, check in CHECKS.items():
            print(f'{name:<18} {(check.__doc__ or "").splitlines()[0]}')
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if args.worker:
        worker(args.out)
        return 0
    cuda = torch.cuda.is_available() and not args.cpu
    if not cuda:
        reason = 'asked for the CPU' if args.cpu else 'there is no CUDA device'
        print(f'gpu_check: {reason}: only what needs none is checked, and no number is that of a GPU', flush=True)
    configs = [str(path.relative_to(ROOT)) for task in ('det', 'seg') for path in sorted(
        (ROOT / 'configs' / task).glob('*/*.py'))] if args.configs == ['all'] else args.configs
    device = torch.device('cuda', 0) if cuda else torch.device('cpu')
    MMLogger.get_current_instance().setLevel('ERROR')
    missing = missing_ops(device)
    with tempfile.TemporaryDirectory(dir=args.out) as scratch, fallbacks(missing):
        place = Place(device, Path(scratch), (256, 256) if cuda else (64, 64), args.batch, configs, args.steps)
        results = run(args.only or list(CHECKS), place)
    report = dict(machine=machine(device), cuda=cuda, missing_ops=missing, checks=results)
    (args.out / 'gpu_check.json').write_text(json.dumps(report, indent=1) + '\n')
    (args.out / 'gpu_check.md').write_text(table(report))
    failed = [result['name'] for result in results if result['status'] == 'failed']
    print(f'gpu_check: {sum(result["status"] == "passed" for result in results)} passed, {len(failed)} failed, '
          f'{sum(result["status"] == "skipped" for result in results)} skipped; {args.out / "gpu_check.md"}')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
