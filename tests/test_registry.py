"""The registry's errors, and the rules of what is registered."""

import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest
from mmengine.registry import Registry

import kd_mm
import kd_mm.adapters
import kd_mm.losses
import kd_mm.regions
import kd_mm.teachers.labels
from kd_mm.adapters.base import Adapter
from kd_mm.losses import CWDLoss
from kd_mm.losses.base.head import HeadLoss
from kd_mm.losses.base.loss import KDLoss
from kd_mm.losses.base.query import QueryLoss
from kd_mm.ops.schedules import Schedule
from kd_mm.regions.base import RegionMask
from kd_mm.registry import MODELS, accepted_arguments, build, choices, discover
from kd_mm.teachers.labels.base import Labeller


def modules():
    return [importlib.import_module(info.name) for info in pkgutil.walk_packages(kd_mm.__path__, 'kd_mm.')]


def test_choices_are_the_registered_classes_of_a_kind():
    assert {'CWDLoss', 'FGDLoss', 'FitNetLoss', 'MGDLoss', 'PKDLoss', 'SigmoidKDLoss', 'SoftmaxKDLoss'} <= set(
        choices(KDLoss))
    assert {'ConvAdapter', 'NormAdapter', 'ResizeAdapter', 'SequentialAdapter'} <= set(choices(Adapter))
    assert {'GTBoxRegion', 'SegClassRegion'} <= set(choices(RegionMask))
    assert {'ConstantSchedule', 'CosineSchedule', 'LinearWarmup', 'WindowSchedule'} <= set(choices(Schedule))
    assert choices(KDLoss) == sorted(choices(KDLoss)) and 'ConvAdapter' not in choices(KDLoss)


@pytest.mark.parametrize('package, base', [
    (kd_mm.losses, KDLoss), (kd_mm.adapters, Adapter), (kd_mm.regions, RegionMask),
    (kd_mm.teachers.labels, Labeller)], ids=lambda item: item.__name__)
def test_a_folder_gives_what_its_files_register(package, base):
    own = [name for name in choices(base) if MODELS.module_dict[name].__module__.startswith(f'{package.__name__}.')]
    assert own and {*own, base.__name__} <= set(package.__all__)
    assert len(set(package.__all__)) == len(package.__all__)
    assert all(getattr(package, name).__name__ == name for name in package.__all__)
    for path in Path(package.__file__).parent.glob('[!_]*'):
        assert path.suffix not in ('', '.py') or f'{package.__name__}.{path.stem}' in sys.modules, path


def test_a_new_file_is_found_and_a_folder_in_it_too(tmp_path, monkeypatch):
    package = tmp_path / 'found_by_name'
    (package / 'base').mkdir(parents=True)
    (package / '__init__.py').write_text('')
    (package / 'base' / '__init__.py').write_text('from found_by_name.base.loss import Base\n')
    (package / 'base' / 'loss.py').write_text('class Base:\n    pass\n')
    registry = Registry('found by name')
    monkeypatch.setattr(registry, 'order', [], raising=False)
    for name in ('zebra', 'ant'):
        (package / f'{name}.py').write_text(
            'from found_by_name import REGISTRY\nfrom found_by_name.base import Base\n'
            f'REGISTRY.order.append({name!r})\n\n'
            f'@REGISTRY.register_module()\nclass {name.title()}(Base):\n    pass\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module('found_by_name')
    module.REGISTRY = registry
    registry.register_module(module=CWDLoss)
    found = discover('found_by_name', module.__path__, registry)
    assert registry.order == ['ant', 'zebra'] and list(found) == ['Ant', 'Zebra']
    for name in [name for name in sys.modules if name.partition('.')[0] == 'found_by_name']:
        monkeypatch.delitem(sys.modules, name)


def test_build_by_name_by_scope_by_class_and_by_instance():
    for kind in ('CWDLoss', 'kd_mm.CWDLoss', CWDLoss):
        loss = build(dict(type=kind, tau=3.0), KDLoss, 'loss')
        assert type(loss) is CWDLoss and loss.tau == 3.0
    assert build(loss, KDLoss, 'loss') is loss
    config = dict(type='CWDLoss', tau=3.0)
    assert build(config, KDLoss, 'loss', divergence='cross_entropy').divergence == 'cross_entropy'
    assert config == dict(type='CWDLoss', tau=3.0)


def test_unknown_type_lists_the_choices():
    with pytest.raises(KeyError) as error:
        build(dict(type='CWDLos'), KDLoss, 'loss')
    message = str(error.value)
    assert 'CWDLos' in message and "Did you mean 'CWDLoss'" in message
    assert all(name in message for name in choices(KDLoss)) and 'ConvAdapter' not in message
    with pytest.raises(KeyError, match='unknown adapter type'):
        build(dict(type='CWDLoss'), Adapter, 'adapter')


@pytest.mark.parametrize('config', [dict(tau=1.0), 'CWDLoss', None, 3])
def test_a_config_needs_a_type(config):
    with pytest.raises(KeyError, match='a loss is a dict with `type`.*CWDLoss'):
        build(config, KDLoss, 'loss')


def test_unknown_argument_lists_the_accepted():
    with pytest.raises(ValueError) as error:
        build(dict(type='CWDLoss', temperature=1.0), KDLoss, 'loss')
    assert "'temperature'" in str(error.value)
    assert all(name in str(error.value) for name in accepted_arguments(CWDLoss))
    with pytest.raises(ValueError, match='SequentialAdapter: .*adapters'):
        build(dict(type='SequentialAdapter'), Adapter, 'adapter')


def test_no_class_passes_arguments_through():
    for base in (KDLoss, Adapter, RegionMask, Schedule):
        for name in choices(base):
            kinds = {p.kind for p in inspect.signature(MODELS.module_dict[name]).parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name


def test_at_most_one_level_of_inheritance():
    for base in (KDLoss, Adapter, RegionMask, Schedule):
        for name in choices(base):
            cls = MODELS.module_dict[name]
            # Losses on whole heads have a base of their own between, and those on DETR-type heads one more.
            own = next((between for between in (QueryLoss, HeadLoss) if issubclass(cls, between)), base)
            assert cls.__bases__ == (own, ), name


def test_every_registered_class_has_an_example():
    for base in (KDLoss, Adapter, RegionMask):
        for name in choices(base):
            assert '>>>' in MODELS.module_dict[name].__doc__, name


def test_importing_kd_mm_needs_no_host():
    assert kd_mm.__version__
    for module in modules():
        for host in ('mmdet', 'mmseg'):  # the entries of the table of hosts have their names
            found = vars(module).get(host)
            assert found is None or found.__name__ == f'kd_mm.hosts.known.{host}', module
