#!/usr/bin/env python3
"""Create the project's virtual environment: pinned packages, a host stack and mmcv's compiled ops.

Standard library only, because it runs before anything is installed.  Called by ``make env``, ``make demo`` and
``make test``; running it again is free when nothing changed.

mmcv has no wheel on the package index, so it is compiled here once and the wheel is kept in the user's cache,
keyed by mmcv, torch and Python version: the next clone needs seconds.  Set ``KD_MM_CACHE`` to move the cache,
``KD_MM_TORCH`` to install another torch than the pinned one (for example a local wheel), ``PYTHON`` in make to use
another interpreter.

A host that builds on others (MMYOLO, MMRotate) has an environment of its own that holds this host alone and finds the
rest in ``.venv``: it takes seconds where that is there.
"""

import argparse
import glob
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path
from typing import Any, Optional, Sequence, Type

ROOT = Path(__file__).resolve().parents[2]
SPECS = ROOT / 'tools' / 'env'
TORCH = os.environ.get('KD_MM_TORCH', 'torch==2.13.0')
# mmcv's build imports pkg_resources, which setuptools 81 removed.
BUILD_TOOLS = ['setuptools==80.9.0', 'wheel==0.45.1', 'ninja==1.13.0', 'packaging==25.0']
MMCV = {'upstream': ('mmcv', '2.1.0'), 'onedl': ('onedl-mmcv', '2.3.6')}
#: Stack with a host on top of those of another stack -> that one.
ON_TOP = {'yolo': 'upstream', 'rotate': 'upstream'}
STACKS = (*MMCV, *ON_TOP)
CHECK_OPS = '''
import torch
from mmcv.ops import RoIAlign, nms
boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 10., 10.], [20., 20., 30., 30.]])
_, keep = nms(boxes, torch.tensor([.9, .8, .7]), 0.5)
assert keep.tolist() == [0, 2], keep
pooled = RoIAlign((2, 2), 1.0, 2)(torch.ones(1, 3, 16, 16), torch.tensor([[0., 2., 2., 8., 8.]]))
assert pooled.shape == (1, 3, 2, 2) and torch.allclose(pooled, torch.ones_like(pooled))
'''


class StepError(RuntimeError):
    """A failed step, with what to do about it."""


class Step:
    """Print what is being done and how long it took; turn a failing command into a message with a mend."""

    count = 0

    def __init__(self, title: str, mend: str) -> None:
        self.title, self.mend = title, mend

    def __enter__(self) -> 'Step':
        Step.count += 1
        self.start = time.time()
        print(f'[setup {Step.count}] {self.title} ...', flush=True)
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Any) -> None:
        if kind is None:
            print(f'[setup {Step.count}] {self.title}: done in {time.time() - self.start:.0f} s', flush=True)
        elif issubclass(kind, (subprocess.CalledProcessError, OSError, StepError)):
            raise SystemExit(f'\nset-up failed at step {Step.count}: {self.title}\n  {error}\n'
                             f'  what to do: {self.mend}')


def run(command: Sequence[Any], **kwargs: Any) -> None:
    subprocess.run([str(part) for part in command], check=True, **kwargs)


def capture(command: Sequence[Any]) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout.strip()


def fingerprint(stack: str) -> str:
    """Hash of everything that decides what the environment holds."""
    base = ON_TOP.get(stack, stack)
    digest = hashlib.sha256(f'{sys.version}|{TORCH}|{BUILD_TOOLS}|{MMCV[base]}'.encode())
    for name in ('base', 'docs', *dict.fromkeys((base, stack)), 'foundation'):
        digest.update((SPECS / f'requirements-{name}.txt').read_bytes())
    digest.update((ROOT / 'setup.py').read_bytes())
    return digest.hexdigest()


def cache_dir() -> Path:
    base = os.environ.get('KD_MM_CACHE') or os.path.join(
        os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache'), 'kd_mm')
    return Path(base)


def check_machine() -> None:
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        raise StepError(f'Python {platform.python_version()} is {sys.executable}; 3.10, 3.11 or 3.12 is needed')
    compiler = os.environ.get('CXX', 'c++')
    if shutil.which(compiler) is None:
        raise StepError(f'no C++ compiler: {compiler!r} is not on PATH')
    header = Path(sysconfig.get_paths()['include']) / 'Python.h'
    if not header.exists():
        raise StepError(f'the C headers of Python are missing: {header}')


def precompile_header(python: Path, source: Path, work: Path) -> str:
    """Compile mmcv's one big header once; every one of its ~100 source files includes it.

    gcc takes a precompiled header only when the flags that shape the code are the build's own.  Some versions of
    setuptools put Python's CFLAGS before the environment's and some replace them, so the environment gets both.
    """
    header = next(Path(source).glob('mmcv/ops/csrc/common/pytorch_cpp_helper.hpp'))
    pch_dir = Path(work) / 'pch'
    pch_dir.mkdir(exist_ok=True)
    copy = pch_dir / header.name
    shutil.copy(header, copy)
    query = ('import sysconfig, torch.utils.cpp_extension as c;'
             'print(sysconfig.get_config_var("CFLAGS") or "");'
             'print(" ".join("-isystem " + p for p in c.include_paths()));'
             'print(sysconfig.get_paths()["include"])')
    python_flags, torch_includes, python_include = capture([python, '-c', query]).splitlines()
    flags = [*python_flags.split(), '-g0', '-w', '-O2']
    command = [os.environ.get('CXX', 'c++'), *flags, '-fPIC', '-std=c++17',
               '-DTORCH_API_INCLUDE_EXTENSION_H', '-DTORCH_EXTENSION_NAME=_ext',
               f'-I{header.parent}', *torch_includes.split(), '-isystem', python_include,
               '-x', 'c++-header', str(copy), '-o', f'{copy}.gch']
    run(command)
    return ' '.join([*flags, '-include', str(copy)])


def build_mmcv(python: Path, stack: str, wheel_dir: Path, jobs: int) -> None:
    name, version = MMCV[stack]
    work = wheel_dir.with_name(wheel_dir.name + f'.build-{os.getpid()}')
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        run([python, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-build-isolation', '--no-binary', ':all:',
             '--dest', work, f'{name}=={version}'])
        archive = next(work.glob('*.tar.gz'))
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, 'data_filter'):
                tar.extractall(work, filter='data')
            else:
                tar.extractall(work)
        source = next(p for p in work.iterdir() if p.is_dir())
        environ = dict(os.environ, MMCV_WITH_OPS='1', MAX_JOBS=str(jobs), FORCE_CUDA=os.environ.get('FORCE_CUDA', '0'))
        environ['PATH'] = f'{Path(python).parent}{os.pathsep}{environ["PATH"]}'  # ninja lives in the venv
        try:
            environ['CFLAGS'] = precompile_header(python, source, work)
        except (subprocess.CalledProcessError, StopIteration) as error:
            print(f'  no precompiled header ({error}); building without it takes about 17 minutes', flush=True)
            environ['CFLAGS'] = '-g0 -w -O2'
        log = work / 'build.log'
        with open(log, 'wb') as stream:
            process = subprocess.Popen(
                [python, '-m', 'pip', 'wheel', '-v', '--no-deps', '--no-build-isolation', '--wheel-dir', work / 'out',
                 source], stdout=stream, stderr=subprocess.STDOUT, env=environ)
            start, shown = time.time(), 0
            while process.poll() is None:
                time.sleep(2)
                done = len(glob.glob(str(source / 'build' / '**' / '*.o'), recursive=True))
                total = len(glob.glob(str(source / 'mmcv/ops/csrc/pytorch/**/*.cpp'), recursive=True))
                line = f'  mmcv: {done} of about {total} files compiled, {(time.time() - start) / 60:.1f} min'
                if done and (sys.stdout.isatty() or done // 20 != shown):
                    print(line, end='\r' if sys.stdout.isatty() else '\n', flush=True)
                    shown = done // 20
        if process.returncode:
            keep = cache_dir() / 'mmcv-build-failed.log'
            shutil.copy(log, keep)
            tail = log.read_text(errors='replace').splitlines()[-15:]
            raise StepError('mmcv did not compile; end of the log:\n    ' + '\n    '.join(tail)
                            + f'\n  whole log: {keep}')
        wheel_dir.mkdir(parents=True, exist_ok=True)
        for wheel in (work / 'out').glob('*.whl'):
            # A rename within one file system: another clone never sees half a wheel.
            os.replace(wheel, wheel_dir / wheel.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def folder_of(stack: str) -> Path:
    return ROOT / ('.venv' if stack == 'upstream' else f'.venv-{stack}')


def pip_of(python: Path) -> Sequence[Any]:
    return [python, '-m', 'pip', '--disable-pip-version-check']


def install_kd_mm(python: Path) -> None:
    with Step('install kd_mm (editable)', 'see the message above'):
        run([*pip_of(python), 'install', '--quiet', '--no-deps', '--no-build-isolation', '--editable', ROOT])


def set_up(stack: str, venv: Path, jobs: int) -> None:
    """Make the environment of a stack, or see that it is there."""
    python, stamp, mark = venv / 'bin' / 'python', venv / '.kd_mm_ready', fingerprint(stack)
    if stack in ON_TOP:
        set_up(ON_TOP[stack], folder_of(ON_TOP[stack]), jobs)
    if stamp.exists() and stamp.read_text() == mark and python.exists():
        return
    started = time.time()
    if stack in ON_TOP:
        set_up_on_top(stack, venv)
    else:
        set_up_whole(stack, venv, jobs)
    stamp.write_text(mark)
    print(f'[setup] {venv.name} is ready ({(time.time() - started) / 60:.1f} min). '
          f'Activate it with: source {venv.name}/bin/activate', flush=True)


def set_up_on_top(stack: str, venv: Path) -> None:
    """An environment that holds one host, on top of that of another stack."""
    base = folder_of(ON_TOP[stack])
    python = venv / 'bin' / 'python'
    query = 'import sysconfig; print(sysconfig.get_paths()["purelib"])'
    with Step(f'create {venv.name} on top of {base.name}', 'install the venv module of this Python (python3-venv)'):
        run([sys.executable, '-m', 'venv', '--clear', '--without-pip', venv])
        below = capture([base / 'bin' / 'python', '-c', query])
        # As a folder of its own, so that what is installed editable there is found, too.
        (Path(capture([python, '-c', query])) / 'below.pth').write_text(f'import site; site.addsitedir({below!r})\n')
        (venv / 'foundation').symlink_to(os.path.relpath(base / 'foundation', venv))
    with Step(f'install what requirements-{stack}.txt names', 'see the message above'):
        run([*pip_of(python), 'install', '--quiet', '--no-deps', '-r', SPECS / f'requirements-{stack}.txt'])
    install_kd_mm(python)


def set_up_whole(stack: str, venv: Path, jobs: int) -> None:
    """An environment with torch, mmcv's compiled operations and the hosts."""
    python = venv / 'bin' / 'python'
    pip = pip_of(python)
    with Step('check Python, the C++ compiler and the Python headers',
              'install Python 3.10 to 3.12 with its headers (python3-dev), python3-venv and g++; '
              'PYTHON=/path/to/python3.11 make ... picks an interpreter'):
        check_machine()
    if not python.exists():
        with Step(f'create {venv.name}', 'install the venv module of this Python (python3-venv)'):
            run([sys.executable, '-m', 'venv', venv])
    with Step(f'install {TORCH} and build tools',
              'see the message above; KD_MM_TORCH=/path/to/torch.whl or KD_MM_TORCH=torch==X.Y.Z takes another torch'):
        run([*pip, 'install', '--quiet', *BUILD_TOOLS])
        installed = subprocess.run([python, '-c', 'import torch'], capture_output=True).returncode == 0
        if not installed:
            run([*pip, 'install', '--quiet', TORCH])
    with Step('install the pinned packages',
              'see the message above; a mirror or proxy is set in pip.conf; numpy and scipy need a 64-bit system'):
        files = [SPECS / f'requirements-{name}.txt' for name in ('base', 'docs', stack)]
        run([*pip, 'install', '--quiet', '--no-deps', *[word for file in files for word in ('-r', file)]])

    name, version = MMCV[stack]
    torch_version = capture([python, '-c', 'import torch; print(torch.__version__)'])
    tag = f'{name}-{version}-torch{torch_version}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}'
    wheel_dir = cache_dir() / 'wheels' / tag.replace('+', '_')
    mend = (f'remove {wheel_dir} and run again; MAX_JOBS=1 if the machine ran out of memory; '
            'a C++17 compiler (g++ 9 or later) is needed')
    for attempt in ('cached', 'rebuilt'):
        if not list(wheel_dir.glob('*.whl')):
            with Step(f'compile {name} {version} (about 6 minutes on two cores; only once on this machine)', mend):
                build_mmcv(python, stack, wheel_dir, jobs)
        with Step(f'install {name} {version} and try its ops', mend):
            run([*pip, 'install', '--quiet', '--no-deps', '--force-reinstall', *wheel_dir.glob('*.whl')])
            broken = subprocess.run([python, '-c', CHECK_OPS], capture_output=True, text=True)
            if broken.returncode == 0:
                break
            if attempt == 'cached':
                print('  the cached wheel does not work here; building it again', flush=True)
                shutil.rmtree(wheel_dir)
                continue
            raise StepError(f'mmcv is installed but its ops fail: {broken.stderr.strip()}')
    with Step('install timm for the tests, in a folder of its own', 'see the message above'):
        shutil.rmtree(venv / 'foundation', ignore_errors=True)
        run([*pip, 'install', '--quiet', '--no-deps', '--target', venv / 'foundation',
             '-r', SPECS / 'requirements-foundation.txt'])
    install_kd_mm(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--stack', choices=sorted(STACKS), default='upstream')
    parser.add_argument('--venv', help='folder of the environment (default: .venv, or .venv-STACK)')
    parser.add_argument('--jobs', type=int, default=int(os.environ.get('MAX_JOBS', os.cpu_count() or 1)))
    args = parser.parse_args()
    set_up(args.stack, ROOT / args.venv if args.venv else folder_of(args.stack), args.jobs)


if __name__ == '__main__':
    main()
