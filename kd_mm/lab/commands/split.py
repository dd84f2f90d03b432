"""``kd-mm split``: data and configs of a training whose classes grow, step by step."""

import os
import os.path as osp
from typing import Sequence

import click

from kd_mm.hosts.zoo import zoo_config
from kd_mm.lab.commands import REFUSALS, fail
from kd_mm.lab.configs import read_config
from kd_mm.lab.steps import PROTOCOLS, UNSEEN, split


@click.command('split')
@click.argument('config')
@click.argument('steps', nargs=-1, required=True)
@click.option('--out', required=True, help='Folder for the labels and the configs of the steps.')
@click.option('--protocol', type=click.Choice(PROTOCOLS), default='overlapped', show_default=True,
              help='Training images of a step: all with a new class, or those of them without one of a later step.')
@click.option('--unseen', type=click.Choice(UNSEEN), default='background', show_default=True,
              help='Segmentation: what pixels of classes are that a step does not label. MiB and PLOP need background.')
@click.option('--occurring', is_flag=True, help='Count only classes that the training labels have.')
@click.option('--overwrite', is_flag=True, help='Write into a folder that is not empty.')
def command(config: str, steps: Sequence[str], out: str, protocol: str, unseen: str, occurring: bool,
            overwrite: bool) -> None:
    """Split the data of CONFIG into STEPS in which a model learns new classes.

    STEPS are class names with commas, a word a step (RBC,WBC Platelets), or numbers in the order of the classes (8+3).
    In the training data of a step its new classes alone are labelled, in its validation data all so far. For each step,
    and for a joint training on all classes, a config over CONFIG is written: step1.py, step2.py, ..., joint.py.
    """
    try:
        if osp.isfile(out) or (osp.isdir(out) and os.listdir(out) and not overwrite):
            raise FileExistsError(f'{out} is there already and not empty. Choose another folder, or give --overwrite')
        cfg = read_config(config)
        file = osp.abspath(str(zoo_config(config)) if '::' in config else osp.expanduser(config))
        found = split(cfg, file, steps, out, protocol, unseen, occurring)
    except REFUSALS as error:
        fail(error)
    for step in found:
        labels = ', '.join(f'{name} {count}' for name, count in step.labels.items())
        images = f'{step.images[0]} of {step.images[1]} images'
        click.echo(f'{osp.join(out, step.name)}.py: {images}; labelled: {labels}')
    empty = [name for name, count in found[-1].labels.items() if not count]
    if empty:
        click.echo(f'Without any label in the training data: {", ".join(empty)}. --occurring leaves such classes out')
    click.echo(f'Train step 1 with kd-mm train {osp.join(out, "step1.py")}; a later step learns from the one before, '
               'see docs/growing.md')
