"""One rank of the two-process test of FlexibleRunner: strategies, a sharded teacher, a cut run, in one launch.

What each of the runs has learned is saved by name; the test compares them with one process on the joined batch.
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1)]

import conftest  # noqa: E402, F401
from flexible import flexible  # noqa: E402
from mmseg.models.backbones.resnet import BasicBlock  # noqa: E402
from ranks import without_batch_statistics  # noqa: E402
from stock import Recorder, distill_hook, hook, make_runner, segmentor, teacher_of  # noqa: E402
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy  # noqa: E402

STEPS = 4


def config(root, work, batch, launcher):
    cfg = without_batch_statistics(segmentor(root, work, steps=STEPS), batch, launcher)
    cfg.pop('model_wrapper_cfg', None)
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.01))
    cfg.param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3)]
    cfg.default_hooks.checkpoint.update(interval=2)
    return cfg


def entry(cfg, weights, **extra):
    adapter = dict(type='ConvAdapter', always=True)
    losses = dict(
        loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg'),
        loss_unit=dict(type='FitNetLoss', at='backbone.layer3.0', adapter=adapter),
        loss_inside=dict(type='FitNetLoss', at='backbone.layer2.0.conv2', adapter=adapter))
    return hook(teacher_of(cfg, backbone=dict(depth=34)), losses, teacher_ckpt=weights, inherit=('decode_head', ),
                adapter_lr_mult=0.5, **extra)


def learned(runner, state, recorder):
    distiller = distill_hook(runner).distiller
    return dict(student=state, extras=distiller.terms.state_dict(), losses=recorder.losses, teacher=sum(
        parameter.numel() if not hasattr(parameter, 'to_local') else parameter.to_local().numel()
        for parameter in distiller.teacher.model.parameters()))


def started_from(cfg, path):
    """FlexibleRunner builds the model at another place than Runner, from other random numbers."""
    cfg.model.init_cfg = dict(type='Pretrained', checkpoint=path)
    return cfg


def main(root, out, weights, student, batch, launcher):
    cfg = started_from(config(root, f'{out}_work', int(batch), launcher), student)
    found = {}

    def run(name, runner):
        # Every rank starts its adapters elsewhere: the hook must bring them together.
        distill_hook(runner).config['seed'] = runner.rank
        recorder = Recorder()
        runner.register_hook(recorder)
        runner.train()
        if launcher != 'none':
            torch.distributed.barrier()  # the first rank has written its checkpoint
        if hasattr(runner, 'strategy') and 'FSDP' in type(runner.strategy).__name__:
            state = torch.load(f'{runner.work_dir}/iter_{STEPS}.pth', weights_only=True)['state_dict']
        else:
            state = (runner.model.module if launcher != 'none' else runner.model).state_dict()
        found[name] = learned(runner, state, recorder)

    if launcher == 'none':
        run('joined', make_runner(cfg, [entry(cfg, weights)]))
    else:
        policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={BasicBlock})
        wrapper = dict(type='MMFullyShardedDataParallel', device_id=torch.device('cpu'), auto_wrap_policy=policy)
        cfg.launcher = 'pytorch'

        def sharded(folder, **extra):
            resume = extra.pop('resume', False)
            # Not 'full': its offload to the CPU frees weights that are on a CPU already, and torch 2.13 crashes.
            form = dict(state_dict_type='FULL_STATE_DICT', state_dict_config=dict(type='FullStateDictConfig'),
                        optim_state_dict_config=dict(type='FullOptimStateDictConfig'))
            strategy = dict(type='FSDPStrategy', state_dict_cfg=form, model_wrapper=dict(wrapper))
            return flexible(cfg, strategy, [entry(cfg, weights, **extra)], work_dir=f'{out}_{folder}', resume=resume)

        run('shards', sharded('shards'))
        (Path(f'{out}_shards') / 'last_checkpoint').write_text(f'{out}_shards/iter_2.pth')
        torch.distributed.barrier()
        run('resumed', sharded('shards', resume=True))
        run('sharded teacher', sharded('teacher', shard_teacher=True))
        try:
            ema = dict(entry(cfg, 'random'), teacher=dict(type='EMATeacher'), teacher_ckpt=None, inherit=())
            ema['losses']['loss_kd']['loss_weight'] = 'auto'
            refused = sharded('refused')
            refused.hooks[:] = [one for one in refused.hooks if type(one).__name__ != 'DistillHook']
            refused.register_hook(ema)
            refused.train()
        except ValueError as error:
            found['refused'] = str(error)
        run('ddp', flexible(cfg, dict(type='DDPStrategy', model_wrapper=dict(
            type='MMDistributedDataParallel', device_ids=None)), [entry(cfg, weights)], work_dir=f'{out}_ddp'))
    rank = torch.distributed.get_rank() if launcher != 'none' else 0
    torch.save(found, f'{out}_rank{rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
