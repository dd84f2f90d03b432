"""One entry of ``losses``: what to compare, how to adapt it, what to compute."""

from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

from torch import Tensor, nn

from kd_mm.adapters.auto import auto_adapter
from kd_mm.adapters.base import Adapter, adapted, prepared
from kd_mm.engine.readers.base import Comparison, Reader
from kd_mm.engine.readers.heads import HeadReader
from kd_mm.engine.readers.instance_masks import InstanceMaskReader
from kd_mm.engine.readers.maps import MapReader
from kd_mm.engine.readers.proposals import ProposalReader
from kd_mm.hosts.places import INSTANCE_MASKS, SHARED
from kd_mm.hosts.tokens import TokenSize, looks_like_token_size, token_sizes
from kd_mm.losses.base.head import HeadLoss
from kd_mm.losses.base.loss import Adversarial, KDLoss, PicksInstances, ReadsModules
from kd_mm.ops.checks import entries, texts, whole
from kd_mm.ops.classes import ClassPair, check_classes, map_classes
from kd_mm.ops.modes import eval_mode
from kd_mm.regions.base import RegionMask
from kd_mm.registry import build
from kd_mm.types.proposals import OF_CLASSES, PROPOSALS

TAP_KEYS = ('at', 'student_at', 'teacher_at', 'levels', 'adapter', 'region', 'classes', 'teacher', 'proposals',
            'tokens')
#: Name of the student among the models of a step.
STUDENT = 'student'
_SWAPPED = {'student_at': 'teacher_at', 'teacher_at': 'student_at'}


def _levels(owner: str, value: Any) -> Dict[str, Optional[List[int]]]:
    """Level indices of student and teacher from ``levels=``: a list for both, or a dict with both sides."""
    if value is None:
        return {'student': None, 'teacher': None}
    if hasattr(value, 'get'):
        if set(value) - {'student', 'teacher'}:
            raise ValueError(f'{owner}: levels={dict(value)!r} may have the keys `student` and `teacher` only')
        return {side: None if value.get(side) is None else entries(owner, f'levels[{side!r}]', value[side], _index)
                for side in ('student', 'teacher')}
    both = entries(owner, 'levels', value, _index)
    return {'student': both, 'teacher': list(both)}


def _index(owner: str, name: str, value: Any) -> int:
    return whole(owner, name, value, None)


def mirrored(cfg: Any) -> Dict[str, Any]:
    """The config of a loss with the two sides exchanged: what a peer learns from the student.

    Example:
        >>> mirrored(dict(type='CWDLoss', student_at='neck', teacher_at='backbone'))
        {'type': 'CWDLoss', 'teacher_at': 'neck', 'student_at': 'backbone'}
    """
    content: Dict[str, Any] = {
        str(_SWAPPED.get(key, key)): value for key, value in dict(cfg).items() if key != 'teacher'}
    for key in ('levels', 'tokens'):
        sides: Any = content.get(key)
        if hasattr(sides, 'get') and set(sides or ()) <= {'student', 'teacher'}:
            content[key] = {'student': sides.get('teacher'), 'teacher': sides.get('student')}
    region: Any = content.get('region')
    logits_at: Any = region.get('logits_at') if hasattr(region, 'get') else None
    if hasattr(logits_at, 'get'):
        content['region'] = dict(region, logits_at={'student': logits_at.get('teacher'),
                                                    'teacher': logits_at.get('student')})
    return content


def mirror_of(term: 'Term', cfg: Any, peer: str) -> 'Term':
    """What a peer learns from the student, by a term of the student.

    Args:
        term: with the peer as its source.
        cfg: of the term.
        peer: its name.

    Raises:
        ValueError: there is no such term.
    """
    kind = type(term.loss).__name__
    if len(term.sources) > 1:
        raise ValueError(f'{term.name}: a peer cannot be averaged with other teachers; give each its own loss')
    if isinstance(term.loss, Adversarial):
        raise ValueError(f'{term.name}: {kind} trains a network against the student, which is not supported between '
                         f'peers (teacher {peer!r}). Use another loss, or a fixed teacher')
    if getattr(term.loss, 'cross_head', None) is not None:
        raise ValueError(f'{term.name}: {kind} sends the student through the head of its teacher, which must not '
                         f'change in the same step; the peer {peer!r} does. Use another loss, or a fixed teacher')
    mirror = Term(term.name, mirrored(cfg), learner=peer)  # may hold in one direction only
    mirror.sources = (STUDENT, )
    return mirror


class Term(nn.Module):
    """One entry of ``losses``: a reader, an adapter, a region, a loss and its weight.

    Args:
        name: key of the loss dict; must start with ``loss_``.
        cfg: the loss's config with the keys ``at`` (or ``student_at`` and ``teacher_at``), ``levels``, ``adapter`` and
            ``region`` besides the loss's own; for a logit loss between models of different classes ``classes``
            (see :func:`kd_mm.ops.classes.map_classes`; default that of the teacher); with several teachers
            ``teacher``: the name of one, or names whose outputs are averaged, class by class where they know different
            ones.  At a place of shared proposals (``'@roi_logits'`` and its like, see
            :mod:`kd_mm.hosts.heads.proposals`) ``levels`` are the stages of a cascade and ``proposals`` says whose they
            are: ``'student'`` (default) or ``'teacher'``.  ``tokens`` says what map the (N, L, C) tokens at the taps
            make: (H, W) in cells, or one whole number, the stride in pixels; for both sides or ``dict(student=...,
            teacher=...)``.  Default: from the call or the input, see :class:`kd_mm.hosts.taps.Tap`.  (For a loss with
            an argument ``tokens`` of its own, any other value is that.)
        learner: name of the model that learns; another than the student's for the mirror of a term with a peer.

    Attributes:
        sources: names of the models that it learns from.
        reader: finds and reads what is compared, see :mod:`kd_mm.engine.readers`.
        title: name for messages.

    Raises:
        ValueError: the config is wrong.
    """

    reader: Reader

    def __init__(self, name: str, cfg: Any, learner: str = STUDENT):
        super().__init__()
        if not name.startswith('loss_') or not name.isidentifier():
            raise ValueError(f'{name!r}: a loss name must start with `loss_` and be an identifier; the host '
                             'back-propagates only keys that contain `loss`')
        if not hasattr(cfg, 'items'):
            raise ValueError(f'{name}: {cfg!r} is not a config; write {name}=dict(type=..., at=...)')
        self.name, self.learner = name, learner
        self.title = name if learner == STUDENT else f'{name} (the peer {learner!r} learning from the student)'
        cfg = dict(cfg)
        self._check_kinds(cfg)
        at, levels = self._at(cfg), _levels(self.title, cfg.get('levels'))
        shared = self._shared_place(at, cfg.get('proposals'))
        of_taps = looks_like_token_size(cfg.get('tokens'))
        try:
            #: what map the tokens at the taps make, by side.
            self.tokens: Dict[str, Optional[TokenSize]] = token_sizes(cfg['tokens'] if of_taps else None)
        except ValueError as error:
            raise ValueError(f'{self.title}: {error}') from error
        self._build(cfg, of_taps)
        self._check(cfg, shared, of_taps)
        self.reader = self._reader(at, levels, shared, cfg)
        #: with ``classes``: which ones to compare, by source.
        self.chosen: Dict[str, ClassPair] = {}
        #: whether its teachers know different classes, each of which has the mean of those that know it.
        self.united = False

    # ------------------------------------------------------------------ building

    def _check_kinds(self, cfg: Dict[str, Any]) -> None:
        """Refuse values of another kind (numbers, truth values) for what is a name or a list of names."""
        for key, example in (('at', "'neck'"), ('student_at', "'neck'"), ('teacher_at', "'neck'"),
                             ('teacher', 'the name of a teacher')):
            if cfg.get(key) is not None:
                texts(self.title, key, cfg[key], example)
        if cfg.get('classes') is not None:
            check_classes(self.title, cfg['classes'])

    def _at(self, cfg: Dict[str, Any]) -> Dict[str, Any]:
        both, student, teacher = (cfg.get(key) for key in TAP_KEYS[:3])
        if both is not None and (student is not None or teacher is not None):
            raise ValueError(f'{self.title}: give either `at` or `student_at` with `teacher_at`')
        if (both or student) is None or (both or teacher) is None:
            raise ValueError(f"{self.title}: where to tap? Give `at` (a module path such as 'neck'), or `student_at` "
                             'and `teacher_at`')
        return {'student': both or student, 'teacher': both or teacher}

    def _shared_place(self, at: Dict[str, Any], proposals: Any) -> Optional[str]:
        """The place of shared proposals that ``at`` names, if it names one.

        Raises:
            ValueError: only one side names it, or ``proposals`` is not possible.
        """
        places = [place for place in at.values() if isinstance(place, str) and place in SHARED]
        if places and at['student'] != at['teacher']:
            raise ValueError(f'{self.title}: {places[0]!r} asks both models about the same proposals: write at='
                             f'{places[0]!r}')
        if proposals is not None and (not places or not places[0].startswith('@roi')
                                      or proposals not in PROPOSALS):
            raise ValueError(f'{self.title}: proposals={proposals!r} must be one of '
                             f'{", ".join(map(repr, PROPOSALS))}, at a place of RoIs such as '
                             "'@roi_logits'")
        return places[0] if places else None

    def _build(self, cfg: Dict[str, Any], of_taps: bool) -> None:
        try:
            self.loss = build({key: value for key, value in cfg.items()
                               if key not in TAP_KEYS or (key == 'tokens' and not of_taps)}, KDLoss, 'loss')
            region = cfg.get('region')
            self.region = None if region is None else build(region, RegionMask, 'region')
            self.adapter_cfg = cfg.get('adapter', 'auto')
            self.adapter: Optional[Adapter] = None
            if self.adapter_cfg not in (None, 'auto'):
                if isinstance(self.adapter_cfg, str):
                    raise ValueError(f"adapter={self.adapter_cfg!r}: give 'auto', None or a dict with `type`")
                self.adapter = build(self.adapter_cfg, Adapter, 'adapter')
        except (KeyError, ValueError) as error:
            raise ValueError(f'{self.title}: {error.args[0]}') from error

    def _check(self, cfg: Dict[str, Any], shared: Optional[str], of_taps: bool) -> None:
        name = type(self.region or self.loss).__name__
        picks = isinstance(self.loss, PicksInstances) and self.loss.heads_at is not None
        if shared and (self.region is not None or self.loss.needs_boxes or self.loss.needs_seg_map
                       or self.of_heads or picks):
            raise ValueError(f'{self.title}: {name} looks at images, and {shared!r} gives rows. Tap maps')
        #: whether both models must have the same classes.
        self.of_classes: bool = shared in OF_CLASSES if shared else self.loss.logits
        self.classes = cfg.get('classes')
        if self.classes is not None and not self.of_classes:
            raise ValueError(f'{self.title}: classes={self.classes!r} is for logit losses, and '
                             f'{type(self.loss).__name__} is none')
        sources = cfg.get('teacher')
        self.sources: Tuple[str, ...] = (sources, ) if isinstance(sources, str) else tuple(sources or ())
        if len(self.sources) > 1 and picks:
            raise ValueError(f'{self.title}: {type(self.loss).__name__} looks at the head of one teacher; name one')
        if len(self.sources) > 1 and self.region is not None and self.region.logits_at:
            raise ValueError(f'{self.title}: {name} looks at the logits of one teacher; name one')
        given = [key for key in ('levels', 'adapter', 'region', 'classes') if cfg.get(key) is not None]
        given += ['tokens'] if of_taps else []
        if self.of_heads and (given or len(self.sources) > 1):
            raise ValueError(f'{self.title}: {type(self.loss).__name__} compares one head with one: remove '
                             f'{", ".join(given) or "all teachers but one"} (loss_weight may be a list, with 0 for a '
                             'level that is not wanted)')

    def _reader(self, at: Dict[str, Any], levels: Dict[str, Optional[List[int]]], shared: Optional[str],
                cfg: Dict[str, Any]) -> Reader:
        if shared == INSTANCE_MASKS:
            return InstanceMaskReader(self.title, at, levels)
        if shared:
            return ProposalReader(self.title, at, levels, cfg.get('proposals', PROPOSALS[0]))
        if isinstance(self.loss, HeadLoss):
            return HeadReader(self.title, at, self.loss)
        logits_at = self.region.logits_at if self.region is not None else None
        return MapReader(self.title, at, levels, logits_at,
                         self.loss if isinstance(self.loss, PicksInstances) else None)

    @property
    def of_heads(self) -> bool:
        """Whether the loss compares views of two heads."""
        return isinstance(self.loss, HeadLoss)

    @property
    def shared(self) -> Optional[str]:
        """The place of shared proposals; None for everything else."""
        return self.reader.place if isinstance(self.reader, (ProposalReader, InstanceMaskReader)) else None

    @property
    def student_paths(self) -> List[str]:
        """Every tap of the side that learns."""
        return self.reader.paths['student']

    @property
    def teacher_paths(self) -> List[str]:
        """Every tap of the side that is learned from."""
        return self.reader.paths['teacher']

    @property
    def needs_boxes(self) -> bool:
        return self.loss.needs_boxes or (self.region is not None and self.region.needs_boxes)

    @property
    def needs_seg_map(self) -> bool:
        return self.loss.needs_seg_map or (self.region is not None and self.region.needs_seg_map)

    @property
    def label(self) -> str:
        """Name for log entries, without the word that would make the host back-propagate them."""
        return self.name[len('loss_'):].replace('loss', '').strip('_') or 'kd'

    def map_classes(self, source: str, student: Optional[Sequence[str]], teacher: Optional[Sequence[str]],
                    classes: Any = None, counts: Tuple[Optional[int], Optional[int]] = (None, None)) -> None:
        """Settle which logits of the learner and of one source belong together.

        Args:
            source: as :attr:`sources` names it.
            student, teacher: class names, None where they are not known.
            classes: see :func:`kd_mm.ops.classes.map_classes`; default that of the term.
            counts: numbers of classes.

        Raises:
            ValueError: a class is missing, or there is no one box or mask for several classes.
        """
        try:
            pair = map_classes(self.classes if classes is None else classes, student, teacher, counts)
        except ValueError as error:
            raise ValueError(f'{self.title}: {error}') from error
        if self.shared and self.shared != '@roi_logits' and any(isinstance(index, tuple) for index in pair[1][1]):
            raise ValueError(f'{self.title}: several classes of the teacher are one of the student, and '
                             f"{self.shared!r} has a prediction for each of them. Use '@roi_logits', or a feature loss")
        self.chosen[source] = pair

    def check_pixels(self, resized: bool, viewed: bool) -> None:
        """Whether the term can compare models that do not see the same pixels.

        Args:
            resized: whether the preprocessing of one of them resizes its pictures.
            viewed: whether one of them has a ``view``.

        Raises:
            ValueError: it cannot.
        """
        why = 'resizes them (preprocess size)' if resized else 'sees them at another size (view)'
        if self.shared and (resized or viewed):
            raise ValueError(f'at={self.shared!r} needs both models to see the same pixels, and the teacher {why}')
        if viewed and (self.of_heads or (isinstance(self.loss, PicksInstances) and self.loss.heads_at is not None)):
            raise ValueError(f'{type(self.loss).__name__} compares what two heads say about the same priors or queries,'
                             f" and the teacher {why}: its priors are others. Leave the view out, or compare maps, "
                             "such as '@neck' or '@logits', which are brought to the student's grid")

    def placed(self, problem: str) -> str:
        """A problem with the name of the term, and with its loss and its taps unless it names them."""
        text = problem if problem.startswith(self.title) else f'{self.title}: {problem}'
        missing = [f'{side} {self.reader.where(side)}' for side in ('student', 'teacher')
                   if not any(path in text for path in (repr(self.reader.at[side]), *self.reader.paths[side]))]
        if type(self.loss).__name__ not in text.removeprefix(self.title):
            missing.insert(0, type(self.loss).__name__)
        return f'{text} [{", ".join(missing)}]' if missing else text

    def describe_levels(self) -> str:
        """Which level met which, in words."""
        return self.reader.describe()

    def prepare(self, comparison: Comparison) -> None:
        """Choose the adapter and create every trainable part, for what a first pass gave.

        Raises:
            ValueError: the two sides cannot be compared.
        """
        student, teacher = comparison.student, comparison.teacher
        if not self.of_heads:
            self.loss.check_kinds(student, teacher)
        if self.adapter_cfg == 'auto' and not self.of_heads:
            self.adapter = auto_adapter(self.loss, student, teacher)
        if self.adapter is not None:
            prepared(self.adapter, student, teacher)
            with eval_mode(self.adapter):  # a batch norm in it must not learn from random images
                student, teacher = adapted(self.adapter, student, teacher)
        try:
            self.loss.check_shapes(student, teacher)
        except ValueError as error:
            if self.of_heads:
                raise
            mend = 'Remove adapter=None' if self.adapter_cfg is None else 'Choose another adapter or other taps'
            raise ValueError(f'{self.title}: {error} (adapter={self.adapter_cfg!r}). {mend}') from error
        self.loss.prepare(student, teacher)

    def bind(self, student: List[Any], teacher: List[Any]) -> None:
        """Show the loss the modules behind its levels, if it wants to see them."""
        if isinstance(self.loss, ReadsModules):
            self.loss.bind(student, teacher)

    # ------------------------------------------------------------------ a step

    def evaluate(self, comparison: Comparison) -> List[Dict[str, Tensor]]:
        """The loss of each level by its parts, without ``loss_weight``; see
        :meth:`kd_mm.losses.base.loss.KDLoss.parts`.
        """
        student, teacher = comparison.student, comparison.teacher
        if self.adapter is not None:
            student, teacher = adapted(self.adapter, student, teacher)
        return self.loss.parts(student, teacher, comparison.batch, self.region)


def need_masks(terms: Iterable[Term]) -> bool:
    """Whether a region of some term reads instance masks."""
    return any(term.region is not None and term.region.needs_masks for term in terms)
