"""Teachers in shards: a rank keeps its part of the weights of each block, and has them whole while the block runs."""

from typing import Any, List, Mapping

import torch
from torch import nn

from kd_mm.engine.distiller import Distiller
from kd_mm.engine.preflight import dry_shapes, random_data
from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.models import task_of
from kd_mm.ops.distributed import world_size
from kd_mm.ops.modes import preserved_random_state
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.speed import AUTO, EXACT

#: A block with less than this part of the weights stays whole: a message costs more than it saves.
SMALLEST = 0.01


def shard_teachers(distiller: Distiller, speeds: Mapping[str, Any]) -> List[str]:
    """Shard every teacher of a distiller.

    Its blocks are the largest modules in the backbone and the neck that the host calls as modules. Heads stay whole:
    they are run past their hooks (fact 5 of ARCHITECTURE.md), and in parts by losses on whole heads.

    Args:
        distiller: built, and not attached.
        speeds: name of a teacher -> what ``speed=`` says for it.

    Returns:
        A sentence a teacher: how much of it is sharded.

    Raises:
        ValueError: there is one process only, torch is too old, or a teacher changes or is asked for another form.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise ValueError('kd_mm.DistillHook: shard_teacher=True needs torch 2.6 or newer (this is '
                         f'{torch.__version__}). Leave it out') from None
    if world_size() < 2:
        raise ValueError('kd_mm.DistillHook: shard_teacher=True shares the weights among processes, and this is a '
                         'training in one. Leave it out, or start several (launcher)')
    notes = []
    for name, teacher in distiller.teachers.items():
        if not teacher.fixed:
            raise ValueError(f'kd_mm.DistillHook: shard_teacher=True: teacher {name!r} ({type(teacher).__name__}) '
                             'changes with the student, and only a fixed teacher is sharded')
        if speeds.get(name, AUTO) not in (AUTO, EXACT):
            raise ValueError(f'kd_mm.DistillHook: shard_teacher=True: teacher {name!r} runs in its exact form; leave '
                             'speed out')
        notes.append(_shard(teacher, name, distiller.student, fully_shard))
    return notes


def _shard(teacher: Teacher, name: str, student: nn.Module, fully_shard: Any) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    model = teacher.model
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (world_size(), ))
    blocks = _blocks(model, _called(teacher, student))
    total = sum(parameter.numel() for parameter in model.parameters())
    held = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # A tap ends the teacher's pass by an exception, after which nothing else would give the weights back.
        block.register_forward_hook(_give_back, always_call=True)
    teacher.go(EXACT)
    return (f'teacher {name!r} is sharded: {len(blocks)} blocks with {held / max(total, 1):.0%} of its weights, of '
            f'which each of {world_size()} processes keeps its part; it runs in its exact form')


def _give_back(block: Any, args: Any, output: Any) -> None:
    block.reshard()


def _called(teacher: Teacher, student: nn.Module) -> List[nn.Module]:
    """The modules that one pass of the teacher calls as modules."""
    found: List[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda module, args: found.append(module))
               for module in teacher.model.modules()]
    try:
        with preserved_random_state(0), torch.no_grad():
            for shape in dry_shapes(student, teacher.model):
                found.clear()
                try:
                    data = random_data(student, shape)
                    images = data['inputs']
                    if teacher.channels[1] != images.shape[1]:
                        images = images[:, :1].expand(-1, teacher.channels[1], -1, -1)
                    forward_tensor(teacher.model, images, data['data_samples'])
                    break
                except Exception:  # models raise anything at sizes they cannot take
                    continue
    finally:
        for handle in handles:
            handle.remove()
    return found


def _blocks(model: nn.Module, called: List[nn.Module]) -> List[nn.Module]:
    """The blocks to shard, in the order of the model: none inside another."""
    total = sum(parameter.numel() for parameter in model.parameters())
    known = {id(module) for module in called}
    blocks: List[nn.Module] = []

    def look(module: nn.Module) -> None:
        size = sum(parameter.numel() for parameter in module.parameters())
        if size < SMALLEST * total:
            return
        # The parts of a model (backbone, neck) are split further: whole they would be in memory at once.
        if id(module) in known and module not in parts:
            blocks.append(module)
            return
        for child in module.children():
            look(child)

    parts = [module for name, module in model.named_children() if 'backbone' in name]
    for name, part in model.named_children():
        if task_of(model) is None or 'backbone' in name or 'neck' in name:
            look(part)
    return blocks
