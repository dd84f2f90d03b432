"""``kd-mm init``: write the config of a distillation, with a recipe chosen for the pair."""

import os
import os.path as osp
import pprint
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import click
from mmengine.config import Config

from kd_mm.hosts import checkpoint as ckpt
from kd_mm.hosts.models import build_model, class_names, default_weights, load_config, scope_of_config
from kd_mm.hosts.table import host_of_config
from kd_mm.hosts.weights import load_weights
from kd_mm.hosts.zoo import zoo_config
from kd_mm.lab.commands import REFUSALS, fail
from kd_mm.lab.configs import hook_entries, read_config, unwritable
from kd_mm.lab.models import scope_of
from kd_mm.lab.recipes import AUTO, Choice, choose
from kd_mm.ops.modes import preserved_random_state
from kd_mm.teachers.spec import RANDOM

#: The first words of every config that we write.
WRITTEN = '# Written by kd-mm'


@dataclass
class Plan:
    """What will be distilled into what, checked.

    Attributes:
        student: its config; ``file`` is where it stands.
        teacher: its config; ``source`` is what the hook's ``teacher=`` gets.
        weights: path or URL of the teacher's weights, or ``'random'``.
        choice: the recipe.
        notes: what is worth saying, as sentences.
    """

    student: Config
    file: str
    teacher: Config
    source: str
    weights: str
    choice: Choice
    notes: List[str]

    def text(self) -> str:
        """The config with the distillation, as the text of a file."""
        recipe = self.choice.recipe
        entry = dict(type='kd_mm.DistillHook', teacher=self.source, teacher_ckpt=self.weights,
                     losses=self.choice.losses)
        inherited = bool(self.student.get('custom_hooks'))
        said = [f'{WRITTEN[2:]}. Recipe {recipe.name}: {recipe.what}; {recipe.why}.', *self.choice.steps]
        head = ''.join(f'{textwrap.fill(text, 110, initial_indent="# ", subsequent_indent="#   ")}\n' for text in said)
        if _lazy(self.file):  # such a file is no _base_ of one in the other style
            whole = Config(self.student.to_dict())
            whole.custom_hooks = [*(self.student.get('custom_hooks') or []), entry]
            return f'{head}\n{whole.pretty_text}'
        hook = textwrap.indent(pprint.pformat(entry, width=110, sort_dicts=False), '    ')
        kept = '    *_base_.custom_hooks,\n' if inherited else ''
        return f'{head}\n_base_ = {self.file!r}\n\ncustom_hooks = [\n{kept}{hook},\n]\n'

    def plain_text(self) -> str:
        """The student's config without distillation."""
        text = str(self.student.pretty_text) if _lazy(self.file) else f'_base_ = {self.file!r}\n'
        return f'{WRITTEN}: the student without distillation.\n{text}'


def _lazy(file: str) -> bool:
    return bool(Config._is_lazy_import(file))


def make_plan(student: str, teacher: str, weights: Optional[str], recipe: str) -> Plan:
    """Read both configs, check that the pair makes sense, and choose a recipe.

    Raises:
        FileNotFoundError, KeyError, ValueError: what is wrong and the mend.
    """
    cfg = read_config(student)
    file = osp.abspath(str(zoo_config(student)) if '::' in student else osp.expanduser(student))
    if hook_entries(cfg):
        raise ValueError(f'{student} distils already (custom_hooks has a kd_mm.DistillHook). Train it with kd-mm '
                         'train, or give the plain config of the student')
    for part in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
        if not cfg.get(part):
            raise ValueError(f'{student} has no {part}: a config without data or schedule cannot be trained. Inherit '
                             "from a whole one of the host, such as 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'")
    if unwritable(cfg):
        raise ValueError(f'{student}: {unwritable(cfg)[0]}')
    try:
        theirs, _, path = load_config(teacher)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{error}. Recipes are for teachers that are configs of a host; any other source '
                                '(timm, torch.hub, a class of your own) stands in teacher= of a config by hand, or '
                                'teaches by kd-mm pretrain') from error
    found = weights or default_weights(path)
    if weights is None and path is not None and _same_model(cfg, theirs):
        raise ValueError(f'the teacher {teacher} is the same model as the student {student}, and no weights are given: '
                         'nothing can be learned from itself. Give a larger teacher, or for a student of the same kind '
                         '("born again") the trained weights with --teacher-ckpt FILE')
    sides = [host_of_config(config) for config in (cfg, theirs)]
    if sides[0] is not None and sides[1] is not None and sides[0].host.task != sides[1].host.task:
        raise ValueError(f'{student} is a config of {sides[0].scope} and {teacher} of {sides[1].scope}: no recipe '
                         'distils one task into another. Take a teacher of the same task, or write a config by hand, '
                         "with a loss on features (at='backbone')")
    if found is None:
        raise ValueError(f'{teacher} has no published weights. Give those of your teacher with --teacher-ckpt FILE '
                         "(kd-mm init also takes 'random', to write a config for a dry try)")
    if '://' not in found and found != RANDOM:
        found = osp.abspath(osp.expanduser(found))
        if not osp.isfile(found):
            raise FileNotFoundError(f'no such teacher weights: {weights} (looked at {found})')
    content = ckpt.load_file(found) if '://' not in found and found != RANDOM else None
    notes = _compare_classes(cfg, theirs, content)
    scope = scope_of_config(cfg)
    with scope_of(cfg), preserved_random_state(0):
        models = []
        for side, config in (('student', cfg), ('teacher', theirs)):
            try:
                models.append(build_model(config, scope))
            except Exception as error:  # the registry and the models raise anything
                raise ValueError(f'the model of the {side} cannot be built: {type(error).__name__}: {error}') from error
        if content is not None:
            load_weights(models[1], content, found, strict=True)  # as the training does
        choice = choose(models[0], models[1], recipe, class_names(cfg))
        notes += _compare_sizes(*models)
    source = teacher if '::' in teacher else str(path)
    return Plan(cfg, file, theirs, osp.abspath(source) if '::' not in source else source, found, choice, notes)


def _same_model(one: Config, two: Config) -> bool:
    return bool(one.model.to_dict() == two.model.to_dict())


def _compare_classes(cfg: Config, theirs: Config, content: Optional[Dict[str, Any]]) -> List[str]:
    """A note where the class names of a side are not known; ``content`` is the teacher's checkpoint, where it is here.

    Raises:
        ValueError: they differ.
    """
    own, other = class_names(cfg), class_names(theirs, content)
    if own and other and own != other:
        extra = [name for name in own if name not in other]
        raise ValueError(
            f'student and teacher have different classes: the student has {len(own)} ({_some(own)}), the teacher '
            f'{len(other)} ({_some(other)})' + (f'; the teacher lacks {_some(extra)}' if extra else '')
            + '. Take a teacher that was trained on these classes; or write a config by hand, with a loss on features '
            "(at='neck'), or on logits with classes='common'")
    return [] if own and other else ['the class names of a side are not known, and were not compared']


def _compare_sizes(student: Any, teacher: Any) -> List[str]:
    """A note where the student is no smaller than its teacher."""
    own, theirs = (sum(parameter.numel() for parameter in model.parameters()) for model in (student, teacher))
    if own <= theirs:
        return []
    return [f'NOTE: the student ({own / 1e6:.2f} M parameters) is larger than its teacher ({theirs / 1e6:.2f} M). A '
            'larger model seldom learns from a smaller one: are the two exchanged?']


def _some(names: List[str]) -> str:
    return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')


def default_name(plan: Plan, student: str, teacher: str) -> str:
    """``STUDENT_from_TEACHER_RECIPE``, a valid identifier."""
    stems = [Path(name.split('::')[-1]).stem for name in (student, teacher)]
    return re.sub(r'\W', '_', f'{stems[0]}_from_{stems[1]}_{plan.choice.recipe.name}')


def print_recipe(plan: Plan, steps: bool = True) -> None:
    """Print the recipe: what, why, and how it was chosen."""
    recipe = plan.choice.recipe
    click.echo(f'recipe {recipe.name}: {recipe.what}')
    click.echo(f'  why: {recipe.why}')
    for step in plan.choice.steps if steps else plan.choice.steps[-1:]:
        click.echo(f'  {step}')
    for note in plan.notes:
        click.echo(f'  {note}')


def write_new(path: str, text: str, overwrite: bool = False, ours: bool = False) -> None:
    """Write a config that is not there, or has this very text.

    Args:
        path: of the file.
        text: its content.
        overwrite: whatever is there is lost.
        ours: what a command of ours has written is lost, and nothing else.

    Raises:
        FileExistsError: it is there with another text.
        ValueError: it cannot be written.
    """
    try:
        there = Path(path).read_text(encoding='utf-8', errors='replace') if osp.exists(path) else None
        if there not in (None, text) and not overwrite and not (ours and str(there).startswith(WRITTEN)):
            raise FileExistsError(f'{path} is there already, with another content. Choose another name, or overwrite '
                                  'it with --overwrite')
        os.makedirs(osp.dirname(osp.abspath(path)), exist_ok=True)
        Path(path).write_text(text, encoding='utf-8')
    except OSError as error:
        if isinstance(error, FileExistsError) and error.errno is None:
            raise
        raise ValueError(f'{path} cannot be written: {error.strerror}. Give the name of a file in another folder'
                         ) from error


def check_out(path: Optional[str], *inputs: str) -> None:
    """Refuse a name for a config that is none, or is that of a config which is read.

    Raises:
        ValueError: naming the mend.
    """
    if path is None:
        return
    if not path.endswith('.py'):
        raise ValueError(f'--out {path}: a config is a Python file, and its name ends with .py')
    for file in inputs:
        if osp.exists(path) and osp.exists(file) and osp.samefile(path, file):
            raise ValueError(f'--out {path} is the config {file} itself, which the new one is made from. Choose '
                             'another name')


def pair_options(command: Any) -> Any:
    """The arguments that name a pair and a recipe."""
    for decorate in (
            click.option('--explain', is_flag=True, help='Say how the recipe was chosen, step by step.'),
            click.option('--recipe', default=AUTO, show_default=True, help='Name of a recipe, or auto; kd-mm recipes '
                         'lists them.'),
            click.option('--teacher-ckpt', help="The teacher's weights: path or URL, or random for a dry try. Default: "
                         'the published ones of an installed config.'),
            click.option('--teacher', required=True, help='Config of the teacher: path or mmdet::..., mmseg::... .'),
            click.argument('student')):
        command = decorate(command)
    return command


@click.command('init')
@pair_options
@click.option('--out', help='File to write. Default: STUDENT_from_TEACHER_RECIPE.py in the current folder.')
@click.option('--overwrite', '--force', 'overwrite', is_flag=True, help='Write over a file with another content.')
def command(student: str, teacher: str, teacher_ckpt: Optional[str], recipe: str, explain: bool, out: Optional[str],
            overwrite: bool) -> None:
    """Write the config that distils TEACHER into STUDENT, and nothing else.

    The file is an ordinary one: read it, change it, and train it with kd-mm train or with the host's own
    tools/train.py.
    """
    try:
        check_out(out, student, teacher)
        plan = make_plan(student, teacher, teacher_ckpt, recipe)
        path = out or f'{default_name(plan, student, teacher)}.py'
        print_recipe(plan, explain)
        write_new(path, plan.text(), overwrite)
    except REFUSALS as error:
        fail(error)
    click.echo(f'{path}: written. Check it with kd-mm check {shlex.quote(path)}')
