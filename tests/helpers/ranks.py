"""Real processes over gloo."""

import importlib
import os
import runpy
import socket
import sys
import time
import traceback
from types import SimpleNamespace

import torch
from torch.multiprocessing import start_processes


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def import_hosts():
    """Import what the hosts register, before a fork: each child would do it again."""
    for host in ('mmdet', 'mmseg'):
        importlib.import_module(f'{host}.utils').register_all_modules(init_default_scope=False)


def _rank(rank, arguments, ranks, port):
    torch.set_num_threads(1)  # those of the tests are not there after a fork, and would be waited for
    sys.settrace(None)  # nobody reads what coverage would count here
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                          MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    sys.argv = list(arguments)
    runpy.run_path(arguments[0], run_name='__main__')


def forked(command, cwd=None, env=None, stderr=None):
    """What ``subprocess.run`` does with a script of Python, in a fork: the hosts are there already.

    Args:
        command: the interpreter, which is not looked at, the script, and its arguments.
        stderr: a file for what goes wrong. Default: that of the tests.
    """
    import_hosts()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.settrace(None)  # see above
            os.chdir(cwd or '.')
            os.environ.update(env or {})
            if stderr is not None:
                sys.stderr = stderr
            sys.argv = [str(part) for part in command[1:]]
            runpy.run_path(sys.argv[0], run_name='__main__')
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return SimpleNamespace(returncode=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def run(arguments, out, ranks, limit=300):
    """What each rank of a script has saved; the script and its arguments, as on a command line.

    The ranks are forked, so that the hosts, which take seconds to import, are there already.
    """
    import_hosts()
    context = start_processes(_rank, (arguments, ranks, free_port()), nprocs=ranks, join=False, start_method='fork')
    end = time.monotonic() + limit
    try:
        while not context.join(timeout=1):  # it raises what a rank has raised, and stops the others
            assert time.monotonic() < end, f'{arguments[0]} took more than {limit} s'
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(f'{out}_rank{rank}.pth', weights_only=True) for rank in range(ranks)]


def without_batch_statistics(cfg, batch, launcher):
    """A segmentor's config for one rank: group norm and no dropout, so that ranks must equal one process."""
    norm = dict(type='GN', num_groups=4)
    cfg.merge_from_dict(dict(model=dict(
        backbone=dict(norm_cfg=norm), decode_head=dict(norm_cfg=norm, dropout_ratio=0.0),
        auxiliary_head=dict(norm_cfg=norm, dropout_ratio=0.0))))
    cfg.train_dataloader.batch_size = batch
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    cfg.launcher = launcher
    if launcher == 'pytorch':
        # mmengine's own start asks for a GPU; a group that is there already is left alone.
        torch.distributed.init_process_group('gloo')
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, find_unused_parameters=False)
    return cfg
