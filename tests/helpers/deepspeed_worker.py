"""One rank of the two-process test of DeepSpeed (where it is installed): ZeRO-1 and -2, a cut run, in one launch."""

import importlib.util
import os
import sys
import types
from pathlib import Path

import torch

os.environ.setdefault('DS_ACCELERATOR', 'cpu')
sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1)]

import conftest  # noqa: E402, F401
import deepspeed  # noqa: E402

# DeepSpeed 0.19, the first that steps with torch 2.13, has no longer three optimizers that mmengine 0.10.7 imports.
ONEBIT = 'deepspeed.runtime.fp16.onebit'
if importlib.util.find_spec(ONEBIT) is None:
    sys.modules[ONEBIT] = types.ModuleType(ONEBIT)
    vars(sys.modules[ONEBIT]).update({name: type(name, (torch.optim.SGD, ), {})
                                      for name in ('OnebitAdam', 'OnebitLamb', 'ZeroOneAdam')})

from flexible import flexible  # noqa: E402
from fsdp_worker import STEPS, config, entry, learned, started_from  # noqa: E402
from mmengine.registry import OPTIMIZERS  # noqa: E402
from stock import Recorder, distill_hook  # noqa: E402


def main(root, out, weights, student, batch):
    deepspeed.init_distributed(dist_backend='gloo')
    # 'gloo': the group is there, and no wrapper is wanted
    cfg = started_from(config(root, f'{out}_work', int(batch), 'gloo'), student)
    cfg.launcher = 'pytorch'
    cfg.optim_wrapper.type = 'DeepSpeedOptimWrapper'
    found = {}

    def run(name, stage, folder, resume=False, precision=None, **extra):
        # Half precision is there for its own code paths; nothing is compared.
        half = {precision: dict(enabled=True), 'inputs_to_half': ['inputs']} if precision else {}
        for kind in ('DeepSpeedCPUAdam', 'FusedAdam', 'FusedLamb', 'OnebitAdam', 'OnebitLamb', 'ZeroOneAdam'):
            OPTIMIZERS._module_dict.pop(kind, None)  # a second strategy of a process registers them again, and fails
        strategy = dict(type='DeepSpeedStrategy', zero_optimization=dict(stage=stage), gradient_clipping=0.0, **half,
                        config=dict(zero_allow_untested_optimizer=True))
        runner = flexible(cfg, strategy, [entry(cfg, weights, **extra)], work_dir=f'{out}_{folder}', resume=resume)
        distill_hook(runner).config['seed'] = runner.rank
        recorder = Recorder()
        runner.register_hook(recorder)
        runner.train()
        torch.distributed.barrier()
        state = torch.load(f'{runner.work_dir}/iter_{STEPS}.pth/student.pth', weights_only=True)['state_dict']
        found[name] = learned(runner, state, recorder)

    run('stage 1', 1, 'one')
    run('stage 2', 2, 'two')
    (Path(f'{out}_two') / 'last_checkpoint').write_text(f'{out}_two/iter_2.pth')
    torch.distributed.barrier()
    run('resumed', 2, 'two', resume=True)
    run('bf16', 2, 'half', precision='bf16')
    torch.save(found, f'{out}_rank{torch.distributed.get_rank()}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
    torch.distributed.destroy_process_group()
