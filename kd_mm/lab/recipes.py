"""Recipes: small sets of losses with taps, adapters and weights, and the choice of one for a pair of models.

The order in which ``auto`` tries them is that of our own tables (``configs/*/README.md``): a tiny student, a small set
of pictures, two seeds.  That says that a recipe works and not that it is the best on other data.  For models of a kind
that no table has, ``auto`` says so and takes features at the neck (detector) or logits (segmenter).
"""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import nn

from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.models import build_model, load_config, task_of
from kd_mm.hosts.places import find
from kd_mm.hosts.taps import Tap
from kd_mm.lab.models import random_batch
from kd_mm.losses.base.head import HeadLoss
from kd_mm.ops.modes import eval_mode, preserved_random_state
from kd_mm.registry import MODELS, RECIPES

DENSE, TWO_STAGE, DETR = 'dense detector', 'two-stage detector', 'DETR-type detector'
MASKS, CNN_SEGMENTER, TRANSFORMER_SEGMENTER = 'mask transformer', 'CNN segmenter', 'transformer segmenter'
OTHER = 'detector of another kind'
#: Name of the choice.
AUTO = 'auto'
#: Inputs of the pass that finds strides and widths: small first.
SIZES = (256, 512)


@dataclass(frozen=True)
class Facts:
    """What a model is, as far as a recipe needs it.

    Attributes:
        task: 'detection' or 'segmentation'.
        kind: one of the constants above.
        head: class of its head.
        strides: of the levels at ``'@neck'`` in pixels; empty where it gives no maps.
        widths: channels of these levels.
    """

    task: str
    kind: str
    head: str
    strides: Tuple[int, ...] = ()
    widths: Tuple[int, ...] = ()

    def describe(self) -> str:
        """In words."""
        levels = f', levels of strides {_list(self.strides)} with {_list(self.widths)} channels' if self.strides else ''
        return f'{self.kind} with {self.head}{levels}'


def facts(model: nn.Module) -> Facts:
    """What a model is; one forward pass on a random image for the levels of its neck.

    Raises:
        ValueError: it is of no host.
    """
    task = task_of(model)
    if task is None:
        raise ValueError(f'{type(model).__name__} is no detector or segmenter of a host that is known here')
    kind = _detector(model) if task == 'detection' else _segmenter(model)
    heads = [getattr(model, name, None) for name in ('roi_head', 'bbox_head', 'mask_head', 'panoptic_head',
                                                     'decode_head')]
    head = next((found for found in heads if isinstance(found, nn.Module)), model)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    strides, widths = _levels(model)
    return Facts(task, kind, type(head).__name__, strides, widths)


def _detector(model: Any) -> str:
    if isinstance(getattr(model, 'roi_head', None), nn.Module):
        return TWO_STAGE
    if isinstance(getattr(model, 'panoptic_head', None), nn.Module):
        return MASKS
    if callable(getattr(model, 'forward_encoder', None)):
        return DETR
    try:
        find(model, '@logits')
    except KeyError:
        return OTHER
    return DENSE


def _segmenter(model: Any) -> str:
    head = model.decode_head[-1] if isinstance(model.decode_head, nn.ModuleList) else model.decode_head
    names = {cls.__name__ for cls in type(head).__mro__}
    if names & {'MaskFormerHead', 'Mask2FormerHead'}:
        return MASKS
    attention = any('Attention' in type(module).__name__ and hasattr(module, 'num_heads')
                    or isinstance(module, nn.MultiheadAttention) for module in model.backbone.modules())
    return TRANSFORMER_SEGMENTER if attention else CNN_SEGMENTER


def _levels(model: nn.Module) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
    """Strides and widths of the levels at ``'@neck'``."""
    place = find(model, '@neck')
    for size in SIZES:
        tap = Tap(model, place.paths[0])
        with preserved_random_state(0), torch.no_grad(), eval_mode(model):
            try:
                data = random_batch(model, 1, (size, size), next(model.parameters()).device, training=False)
                tap.arm((size, size))
                forward_tensor(model, data['inputs'], data['data_samples'], [tap.path])
                maps = [tensor for tensor in tap.read() if tensor.dim() == 4]
            except Exception:  # models raise anything at sizes they cannot take
                continue
            finally:
                tap.clear()
        return tuple(round(size / level.shape[2]) for level in maps), tuple(level.shape[1] for level in maps)
    return (), ()


def _list(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else ', '.join(map(str, values))


def shared(own: Facts, theirs: Facts, classes: Optional[Sequence[str]] = None) -> str:
    """What two models have in common, in words; ``classes`` where both know the same.

    Example:
        >>> shared(Facts('detection', DENSE, 'GFLHead', (8, 16), (32, 32)),
        ...        Facts('detection', DENSE, 'ATSSHead', (8, 16), (64, 64)))
        'both have levels of strides 8, 16 (32 and 64 channels); heads of two kinds'
    """
    common = [stride for stride in own.strides if stride in theirs.strides]
    widths = [_list(side.widths) for side in (own, theirs)]
    levels = f'levels of strides {_list(common)} ({" and ".join(dict.fromkeys(widths))} channels)' if common else (
        'no level of one stride')
    heads = 'heads of one kind' if own.head == theirs.head else 'heads of two kinds'
    return f'both have {f"{len(classes)} classes, " if classes else ""}{levels}; {heads}'


@dataclass(frozen=True)
class Recipe:
    """A set of losses.

    Attributes:
        name: as in ``--recipe``.
        task: 'detection' or 'segmentation'.
        what: what is compared, in words.
        why: when it is a good choice.
        losses: ``losses=`` of the hook for a student and a teacher.
        evidence: kind of model -> (row of the method in the table of configs/det or configs/seg, score, the plain
            student's, spread over seeds of both).
    """

    name: str
    task: str
    what: str
    why: str
    losses: Callable[[Facts, Facts], Dict[str, Any]]
    evidence: Dict[str, Tuple[str, float, float, str]] = field(default_factory=dict)

    def measured(self, kind: str) -> str:
        """What our table says for a kind of model, in words."""
        if kind not in self.evidence:
            return f'not measured by us for a {kind}'
        row, score, plain, spread = self.evidence[kind]
        metric, folder = (('COCO mAP in % on BCCD', 'det') if self.task == 'detection'
                          else ('mIoU in % on CamVid', 'seg'))
        return (f'{score} against {plain} of the plain student ({metric}, two seeds, spread {spread}; row `{row}` of '
                f'configs/{folder}/README.md)')


def register(recipe: Recipe) -> Recipe:
    """Add a recipe to the registry, for a package of one's own too (``custom_imports``)."""

    def of_registry() -> Recipe:
        return recipe

    RECIPES.register_module(name=recipe.name, module=of_registry)
    return recipe


def recipes(task: Optional[str] = None) -> List[Recipe]:
    """All registered ones, of one task or of both, in the order of their registration."""
    RECIPES.import_from_location()
    found = [factory() for factory in RECIPES.module_dict.values()]
    return [recipe for recipe in found if task in (None, recipe.task)]


register(Recipe(
    'crosskd', 'detection', "the student's head features go through the teacher's head, and its predictions meet the "
    "teacher's own",
    'the best of our table for dense detectors; both heads must be of one class and width',
    lambda student, teacher: dict(loss_crosskd=dict(type='CrossKDLoss', at='bbox_head')),
    {DENSE: ('crosskd', 42.9, 36.2, '0.4 and 0.7')}))
register(Recipe(
    'mimic', 'detection', 'features of the neck, averaged inside of each object',
    'needs boxes and nothing of the heads: for dense detectors whose heads differ',
    lambda student, teacher: dict(loss_mimic=dict(type='MimicLoss', at='@neck', assign='size', loss_weight=1.0)),
    {DENSE: ('mimic', 42.2, 36.2, '1.3 and 0.7')}))
register(Recipe(
    'defeat', 'detection', 'features of the neck and class scores of proposals, objects and background apart',
    'the best of our table for two-stage detectors',
    lambda student, teacher: dict(
        loss_defeat=dict(
            type='DeFeatLoss', at='@neck', adapter=dict(type='ConvAdapter', kernel_size=3, always=True), fg=3.0,
            bg=12.0, levels=list(range(_shared(student))),
            foreground=dict(type='LevelBoxRegion', strides=list(student.strides[:_shared(student)]))),
        loss_defeat_cls=dict(type='DeFeatClassLoss', at='@roi_logits', proposals='teacher', fg=2.0, bg=2.0)),
    {TWO_STAGE: ('defeat', 49.7, 45.5, '0.6 and 1.9')}))
register(Recipe(
    'pkd', 'detection', 'features of the neck, by the correlation of each channel',
    'features only: no units, no heads, no boxes, so it fits every pair of detectors',
    lambda student, teacher: dict(loss_pkd=dict(type='PKDLoss', at='@neck', loss_weight=10.0)),
    {DENSE: ('pkd', 40.4, 36.2, '0.4 and 0.7'), TWO_STAGE: ('pkd', 48.0, 45.5, '1.0 and 1.9')}))
register(Recipe(
    'reviewkd', 'segmentation', 'the stages of the backbone, each of the student with the same and all deeper ones of '
    'the teacher',
    'the best of our table for CNN segmenters',
    lambda student, teacher: dict(loss_reviewkd=dict(type='ReviewKDLoss', at='@backbone', loss_weight=1.0)),
    {CNN_SEGMENTER: ('reviewkd', 32.6, 21.6, '0.6 and 1.5')}))
register(Recipe(
    'cwd', 'segmentation', 'class logits, as a distribution over the cells of each class',
    'logits only, so it fits every pair of segmenters with the same classes',
    lambda student, teacher: dict(loss_cwd=dict(type='CWDLoss', at='@logits', tau=1.0, loss_weight=5.0)),
    {CNN_SEGMENTER: ('cwd', 25.5, 21.6, '0.0 and 1.5')}))

#: Kind of student -> what ``auto`` tries, best row of our tables first.
ORDER: Dict[str, Tuple[str, ...]] = {
    DENSE: ('crosskd', 'mimic', 'pkd'), TWO_STAGE: ('defeat', 'pkd'), CNN_SEGMENTER: ('reviewkd', 'cwd')}
#: What it takes where no table has anything to say, by task.
FALLBACK = {'detection': 'pkd', 'segmentation': 'cwd'}


def _shared(student: Facts) -> int:
    """Levels of the neck that region proposals of objects come from: the first four at most."""
    return min(len(student.strides), 4)


@dataclass
class Choice:
    """A recipe for a pair.

    Attributes:
        recipe: the one.
        losses: its losses for this pair.
        steps: how it was chosen, as sentences.
    """

    recipe: Recipe
    losses: Dict[str, Any]
    steps: List[str]


def choose(student: nn.Module, teacher: nn.Module, name: str = AUTO, classes: Optional[Sequence[str]] = None) -> Choice:
    """The recipe of a name for two models, or for :data:`AUTO` the first one of our table that fits both.

    Args:
        student, teacher: models of a host; the weights do not matter.
        name: of a recipe.
        classes: the student's class names, if known.

    Raises:
        KeyError: no recipe has the name.
        ValueError: the models are of different tasks, the recipe is for the other task, or it does not fit; the message
            names what would.
    """
    own, theirs = facts(student), facts(teacher)
    if own.task != theirs.task:
        raise ValueError(f'the student does {own.task} and the teacher {theirs.task}: take a teacher of the same task')
    steps = [f'student: {own.describe()}', f'teacher: {theirs.describe()}', shared(own, theirs, classes)]
    known = {recipe.name: recipe for recipe in recipes()}
    if name != AUTO:
        if name not in known:
            raise KeyError(f'unknown recipe {name!r}. Choices: {AUTO}, {", ".join(known)}')
        recipe = known[name]
        if recipe.task != own.task:
            fitting = ', '.join(other.name for other in recipes(own.task))
            raise ValueError(f'the recipe {name!r} is for {recipe.task}, and these models do {own.task}. Choices: '
                             f'{AUTO}, {fitting}')
        refused = refusal(recipe, student, teacher, own, theirs, classes)
        if refused:
            others = [other for other in (known[key] for key in _order(own)[0]) if other.name != name
                      and not refusal(other, student, teacher, own, theirs, classes)]
            mend = f'Take --recipe {others[0].name}, which fits' if others else 'No other recipe fits either'
            raise ValueError(f'the recipe {name!r} does not fit this pair: {refused}. {mend}')
        steps.append(f'{name}: as asked for; {recipe.measured(own.kind)}')
        return Choice(recipe, recipe.losses(own, theirs), steps)
    order, note = _order(own)
    steps += [note] if note else []
    for recipe in (known[key] for key in order):
        refused = refusal(recipe, student, teacher, own, theirs, classes)
        if not refused:
            steps.append(f'{recipe.name}: chosen; {recipe.measured(own.kind)}')
            return Choice(recipe, recipe.losses(own, theirs), steps)
        steps.append(f'{recipe.name}: does not fit: {refused}')
    raise ValueError('no recipe fits this pair:\n  ' + '\n  '.join(steps))


def next_best(student: nn.Module, entry: Mapping[str, Any], problems: Sequence[str], scope: Optional[str] = None,
              folder: Optional[str] = None, classes: Optional[Sequence[str]] = None) -> Optional[str]:
    """What would run where a loss on heads, queries, logits or proposals was refused, as a sentence; else None.

    Losses on features run for any pair, so that their problems are others.

    Args:
        student: the model.
        entry: of the hook; recipes are for teachers that are configs of a host.
        problems: of the hook, as sentences.
        scope, folder: of the student's config.
        classes: the student's class names, if known.
    """
    losses: Any = entry.get('losses')
    teacher: Any = entry.get('teacher')
    found = [MODELS.get(str(loss.get('type'))) for name, loss in losses.items() if hasattr(loss, 'get') and any(
        text.startswith(f'{name}') for text in problems)] if hasattr(losses, 'items') else []
    if not any(cls is not None and (issubclass(cls, HeadLoss) or cls.logits or cls.rows_only) for cls in found):
        return None
    try:
        with preserved_random_state(0):
            choice = choose(student, build_model(load_config(teacher, folder)[0], scope), AUTO, classes)
    except Exception:  # no config, of another task, nothing fits: the refusal itself stands
        return None
    return (f'what fits this pair: losses={choice.losses!r} (the recipe {choice.recipe.name}: {choice.recipe.what}). '
            'kd-mm methods lists what else there is')


def _order(own: Facts) -> Tuple[Tuple[str, ...], Optional[str]]:
    """What to try, and a sentence where it is no choice of ours."""
    if own.kind in ORDER:
        return ORDER[own.kind], None
    name = FALLBACK[own.task]
    what = 'features at the neck' if own.task == 'detection' else 'the class logits'
    return (name, ), f'we have measured nothing for a {own.kind}, so this falls back to {what}'


def refusal(recipe: Recipe, student: nn.Module, teacher: nn.Module, own: Facts, theirs: Facts,
            classes: Optional[Sequence[str]] = None) -> Optional[str]:
    """Why a recipe does not fit two models, in one sentence; None where it does: the distiller is built to see."""
    try:
        Distiller(student, teacher, recipe.losses(own, theirs), classes=classes)
    except Exception as error:  # models and losses raise anything
        found = getattr(error, 'found', None)
        return str(found[0] if found else error).strip().rstrip('.')
    return None
