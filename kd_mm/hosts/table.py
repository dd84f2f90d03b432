"""The table of hosts: what kd_mm must be told of a package whose models it distils.

A host is one :class:`Host`, registered by :func:`register`.  Ours are the files of :mod:`kd_mm.hosts.known`; a package
of somebody else brings its own by an entry point of the group :data:`GROUP`, or by ``custom_imports`` in a config.
Nothing of a host is imported here.

A scope without an entry works where it builds on a host that has one: see :func:`host_of_config`.
"""

import importlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from mmengine.registry import MODELS as ENGINE_MODELS
from torch import nn

from kd_mm.registry import HOSTS

#: Entry points of other packages: the name of a module that registers a host, or of a :class:`Host`.
GROUP = 'kd_mm.hosts'
DETECTION, SEGMENTATION = 'detection', 'segmentation'
TASKS = (DETECTION, SEGMENTATION)
#: What makes what a place stands for of what its tap gives: (module, outputs) -> outputs.
Pick = Callable[[Any, Any], Any]
#: Paths below a head whose outputs are its class logits ('' is the head itself), and what to take of them.
Line = Tuple[Tuple[str, ...], Optional[Pick]]


@dataclass(frozen=True)
class Host:
    """One package with models that can be distilled.

    What an entry leaves out is taken from its ``parent``.  The tables of class names (``logits``, ``no_logits``,
    ``class_rows``, ``fixed``, ``backbones``, ``boxes``, ``towers``) hold for classes that are defined in this package;
    a class that derives from one of another host is found in that host's tables.

    Attributes:
        scope: name of its registries, ``default_scope`` of its configs.
        task: ``'detection'`` or ``'segmentation'``. Default: the parent's.
        parent: scope of the host whose classes it builds on; None for none.
        package: name to import it by. Default: ``scope``.
        index: name on the package index. Default: ``package``.
        versions: (least, below which it must stay) that kd_mm works with; None: any.
        needs: packages that it imports without saying so when it is installed.
        configs: gives the folder above its ``configs``, or None where it is not there. Default: looked for in the
            package, see :func:`kd_mm.hosts.zoo.package_folder`.
        weights: gives the URL of the published weights of one of its configs (a path), or None. Default: from the
            ``metafile.yml`` beside the config.
        logits: class of a head -> where its dense class logits are.
        no_logits: heads that derive from one in ``logits`` and have none.
        backbones: backbones that return more in training than in evaluation -> what they return in both.
        class_rows: class of a head -> its other layers with rows for classes: path -> how they lie, a
            :class:`kd_mm.hosts.growing.Branch`.
        fixed: heads whose classes cannot grow -> why.
        boxes: class of a head -> paths below it that give its box numbers as maps, for heads that return others (the
            mean of a distribution).
        towers: class of a head -> paths of its class and its box tower, lists with one member a level, for heads whose
            towers have other names than those of mmdet (:mod:`kd_mm.hosts.heads.towers`).
        branches: path below a head -> what it gives, a kind of :mod:`kd_mm.hosts.meaning`; levels are left out.
        only_of: of those, the ones that mean it in these heads alone.
        sample: makes a random data sample: (model, index, height, width, classes, generator) -> sample.
        batch: makes a batch as its data preprocessor gets it in training: (model, inputs, samples) -> dict. Default: a
            dict of the two lists.
        packed: makes the data samples that its model is given in training of those that it is given in evaluation,
            where they differ: (model, inputs, samples) -> data samples. Default: they are the same.
        pack: transform that ends a pipeline, by which ``kd-mm pretrain`` reads pictures without labels.
        no_tta: why predictions on flipped pictures cannot be merged where a config does not say how, for ``kd-mm test
            --tta``.

    Raises:
        ValueError: a scope that is no name, or an unknown task.

    Example:
        >>> host = Host('mmfish', parent='mmdet', logits={'FishHead': (('scores', ), None)})
        >>> host.package, host.index
        ('mmfish', 'mmfish')
    """

    scope: str
    task: str = ''
    parent: Optional[str] = None
    package: str = ''
    index: str = ''
    versions: Optional[Tuple[str, Optional[str]]] = None
    needs: Tuple[str, ...] = ()
    configs: Optional[Callable[[], Optional[Path]]] = None
    weights: Optional[Callable[[str], Optional[str]]] = None
    logits: Mapping[str, Line] = field(default_factory=dict)
    no_logits: Tuple[str, ...] = ()
    backbones: Mapping[str, Pick] = field(default_factory=dict)
    class_rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    boxes: Mapping[str, Tuple[str, ...]] = field(default_factory=dict)
    towers: Mapping[str, Tuple[str, str]] = field(default_factory=dict)
    branches: Mapping[str, str] = field(default_factory=dict)
    only_of: Mapping[str, Tuple[str, ...]] = field(default_factory=dict)
    sample: Optional[Callable[..., Any]] = None
    batch: Optional[Callable[..., Dict[str, Any]]] = None
    packed: Optional[Callable[..., Any]] = None
    pack: str = ''
    no_tta: str = ''

    def __post_init__(self) -> None:
        if not isinstance(self.scope, str) or not self.scope:
            raise ValueError(f"Host: scope={self.scope!r} must be the name of a registry scope, such as 'mmdet'")
        if self.task not in TASKS and not (self.parent and self.task == ''):
            raise ValueError(f'Host {self.scope!r}: task={self.task!r} must be one of {", ".join(map(repr, TASKS))}, '
                             'or left out where there is a parent')
        if self.parent is not None and (not isinstance(self.parent, str) or self.parent == self.scope):
            raise ValueError(f"Host {self.scope!r}: parent={self.parent!r} must be the scope of another host, such as "
                             "'mmdet'")
        for name, (needed, fits) in _FORMS.items():
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default and not fits(value):
                raise ValueError(f'Host {self.scope!r}: {name}={value!r} must be {needed}')
        for name, default in (('package', self.scope), ('index', self.package or self.scope)):
            object.__setattr__(self, name, getattr(self, name) or default)


def _names(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(name, str) for name in value)


def _table(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(
        isinstance(key, str) and fits(entry) for key, entry in value.items())


def _line(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and _names(value[0]) and (
        value[1] is None or callable(value[1]))


def _range(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], str) and (
        value[1] is None or isinstance(value[1], str))


#: What branches give, see :mod:`kd_mm.hosts.meaning`.
BRANCHES = ('class', 'objectness', 'box', 'distribution', 'quality')
#: Field of a host -> what it must be, in words and as a check. A text in place of a tuple would be read by its letters.
_FORMS: Dict[str, Tuple[str, Callable[[Any], bool]]] = dict(
    versions=("(least, below), such as ('1.0', '2.0') or ('1.0', None)", _range),
    needs=("a tuple of packages, such as ('scipy', )", _names),
    logits=("a dict from a class to (paths, pick), such as {'MyHead': (('scores.*', ), None)}", _table(_line)),
    no_logits=("a tuple of classes, such as ('MyHead', )", _names),
    backbones=('a dict from a class to a function of (module, outputs)', _table(callable)),
    branches=(f'a dict from a path to one of {", ".join(map(repr, BRANCHES))}', _table(BRANCHES.__contains__)),
    only_of=("a dict from a path to a tuple of classes, such as {'boxes': ('MyHead', )}", _table(_names)),
    boxes=("a dict from a class to a tuple of paths, such as {'MyHead': ('boxes.*', )}", _table(_names)),
    towers=("a dict from a class to two paths, such as {'MyHead': ('cls_tower', 'reg_tower')}", _table(
        lambda value: _names(value) and len(value) == 2)),
    **dict.fromkeys(('configs', 'weights', 'sample', 'batch', 'packed'), ('a function', callable)))
#: What is taken from the parent where an entry leaves it out.
INHERITED = ('task', 'sample', 'batch', 'packed', 'pack')


def register(host: Host) -> Host:
    """Add a host to the table; the same entry may be added twice.

    Raises:
        ValueError: no :class:`Host`, or another entry has its scope already.
    """
    if not isinstance(host, Host):
        raise ValueError(f'a host is a kd_mm.hosts.table.Host, not {host!r}')

    def of_registry() -> Host:
        return host

    there = HOSTS.module_dict.get(host.scope)
    if there is None:
        HOSTS.register_module(name=host.scope, module=of_registry)
    elif there() != host:
        raise ValueError(f'the table of hosts has an entry for the scope {host.scope!r} already; a second one would '
                         'contradict it')
    return host


def hosts() -> Tuple[Host, ...]:
    """All entries, complete; those that build on another one last.

    Raises:
        ValueError: the parent of an entry has none.
    """
    HOSTS.import_from_location()
    return _completed(tuple(HOSTS.module_dict.values()))


def drop_incomplete(scopes: Sequence[str]) -> Dict[str, str]:
    """Take the entries out of the table that cannot be completed, for one of them fails all of :func:`hosts`.

    Args:
        scopes: of the entries to look at.

    Returns:
        Scope -> what is wrong, of those that are gone.
    """
    every = {host.scope: host for host in (factory() for factory in HOSTS.module_dict.values())}
    wrong: Dict[str, str] = {}
    for scope in scopes:
        try:
            _complete(every[scope], every)
        except ValueError as error:
            wrong[scope] = str(error)
    for scope in wrong:
        del HOSTS.module_dict[scope]
    return wrong


@lru_cache(maxsize=8)  # asked for in every step
def _completed(factories: Tuple[Callable[[], Host], ...]) -> Tuple[Host, ...]:
    found = {host.scope: host for host in (factory() for factory in factories)}
    return tuple(sorted((_complete(host, found) for host in found.values()), key=lambda host: host.parent is not None))


def _complete(host: Host, every: Mapping[str, Host]) -> Host:
    if host.parent is None:
        return host
    if host.parent not in every:
        raise ValueError(f'Host {host.scope!r}: its parent {host.parent!r} is not in the table of hosts, which has '
                         f'{", ".join(every)}')
    above = [host.scope]
    while every[above[-1]].parent in every:
        above.append(str(every[above[-1]].parent))
        if above[-1] in above[:-1]:
            raise ValueError(f'Host {host.scope!r}: its parents go in a circle, {" -> ".join(above)}. One of them must '
                             'have no parent, and a task')
    parent = _complete(every[host.parent], every)
    return replace(host, **{name: getattr(host, name) or getattr(parent, name) for name in INHERITED})


def scopes() -> List[str]:
    """The scopes that have an entry."""
    return [host.scope for host in hosts()]


def packages() -> Dict[str, Host]:
    """Name of an importable package -> its host."""
    return {host.package: host for host in hosts()}


def host_of(model: nn.Module) -> Optional[Host]:
    """Whose model this is: the nearest host among the packages of its classes; None for a model of no host.

    A detector of mmdet with parts of a host that builds on mmdet (the box coders and assigners of MMRotate) is that
    host's.

    Example:
        >>> host_of(nn.Linear(1, 1))
    """
    own = class_host(model)
    if own is None:
        return None
    types = {type(value) for module in model.modules() for value in vars(module).values()}
    parts = {_package(cls) for cls in types if not issubclass(cls, nn.Module)}
    return next((host for host in hosts() if host.parent == own.scope and host.package in parts), own)


def class_host(model: nn.Module) -> Optional[Host]:
    """The same by the classes of the model alone: what kind of model it is, in no time."""
    return next(iter(_hosts_of(type(model))), None)


def _hosts_of(cls: type) -> List[Host]:
    """The hosts of a class and of those that it derives from, the nearest first."""
    known = packages()
    names = dict.fromkeys(_package(base) for base in cls.__mro__)
    return [known[name] for name in names if name in known]


def _package(cls: type) -> str:
    return cls.__module__.split('.')[0]


def line(cls: type, column: str) -> Any:
    """What a table of class names says of one class, without those that it derives from; None for nothing.

    Args:
        cls: of a head or backbone.
        column: name of the table, a field of :class:`Host`.

    A class of no host is found by its name in any of the tables: users copy a head to change it.
    """
    host = packages().get(_package(cls))
    for table in (getattr(entry, column) for entry in ([host] if host is not None else hosts())):
        if cls.__name__ in table:
            return table[cls.__name__] if hasattr(table, 'get') else True
    return None


def nearest(module: nn.Module, column: str) -> Any:
    """What a table says of the nearest class of a module that it has; None for nothing."""
    return next((found for found in (line(cls, column) for cls in type(module).__mro__) if found), None)


def branch(head: nn.Module, path: str) -> Optional[str]:
    """The kind of numbers that a branch of a head gives, by the tables of its hosts; None where they do not say.

    Args:
        head: of a model.
        path: below it; a number at its end is a level.
    """
    stem, _, level = path.rpartition('.')
    path = stem if stem and level.isdigit() else path
    kinds = {cls.__name__ for cls in type(head).__mro__}
    for host in _hosts_of(type(head)) or hosts():
        if path in host.branches and not (path in host.only_of and not kinds & set(host.only_of[path])):
            return host.branches[path]
    return None


@dataclass(frozen=True)
class Found:
    """The host of a config.

    Attributes:
        host: its entry, or that of the host it builds on.
        scope: its own registry scope.
        reason: where it has no entry, why it is taken for the other one's; else None.
    """

    host: Host
    scope: str
    reason: Optional[str] = None

    @property
    def note(self) -> Optional[str]:
        """What a user must be told of a scope without an entry, in a sentence; None where there is one."""
        if self.reason is None:
            return None
        return (f'the scope {self.scope!r} has no entry in the table of hosts and is taken for {self.host.scope}: '
                f"{self.reason}. Not known of it: the heads of its own ('@logits', losses on whole heads), a form of "
                'batches of its own, the versions that fit. A line for it: docs/hosts.md')


def host_of_config(cfg: Any) -> Optional[Found]:
    """The host of a config: by its ``default_scope``, else by the class of its model.

    A scope without an entry is taken for the host whose registry is above its own, else for the one from which the
    class of its model derives.  Its package is imported to see that, as mmengine will do to build the model.

    Args:
        cfg: with ``default_scope`` or ``model``.

    Returns:
        None where there is no such host.
    """
    kind, scope = (cfg.get('model') or {}).get('type'), cfg.get('default_scope')
    if not scope:
        name = (kind if isinstance(kind, str) else getattr(kind, '__module__', '')).split('.')[0]
        host = next((host for host in hosts() if name in (host.scope, host.package)), None)
        if host is None and isinstance(kind, type):
            host = next(iter(_hosts_of(kind)), None)
        return None if host is None else Found(host, host.scope)
    return host_of_scope(str(scope), kind)


def host_of_scope(scope: str, kind: Any = None) -> Optional[Found]:
    """The host of a scope; see :func:`host_of_config`.

    Args:
        scope: name of registries.
        kind: class of a model, or its name.
    """
    host = next((host for host in hosts() if host.scope == scope), None)
    if host is not None:
        return Found(host, scope)
    registry = _registry(scope)
    above = registry
    while above is not None:
        host = next((host for host in hosts() if host.scope == above.scope), None)
        if host is not None:
            return Found(host, scope, f"its registry of models is below that of {host.scope}")
        above = above.parent
    if isinstance(kind, str) and registry is not None:
        try:
            kind = registry.get(kind.removeprefix(f'{scope}.'))
        except Exception:  # a registry imports the package's models, which raise anything
            return None
    for base in kind.__mro__ if isinstance(kind, type) else ():
        host = packages().get(_package(base))
        if host is not None:
            return Found(host, scope, f'its {kind.__name__} derives from {base.__name__} of {host.package}')
    return None


def _registry(scope: str) -> Any:
    """The registry of models of a scope; None where it is not there."""
    for name in (f'{scope}.registry', scope):
        try:
            importlib.import_module(name)
            break
        except Exception:  # a package may raise anything while it is imported
            continue
    todo = [ENGINE_MODELS]
    while todo:
        registry = todo.pop()
        if registry.scope == scope:
            return registry
        todo += registry.children.values()
    return None
