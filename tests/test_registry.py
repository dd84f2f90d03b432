"""The registry's errors, and the rules of what is registered."""

import importlib
import inspect
import pkgutil

import pytest

import kd_mm
from kd_mm.adapters import Adapter
from kd_mm.losses import CWDLoss, KDLoss
from kd_mm.losses.head_base import HeadLoss
from kd_mm.losses.query_base import QueryLoss
from kd_mm.regions import RegionMask
from kd_mm.registry import MODELS, accepted_arguments, build, choices
from kd_mm.schedules import Schedule

PACKAGES = ('functional', 'blocks', 'losses', 'adapters', 'regions', 'views')


def modules():
    for name in PACKAGES:
        module = importlib.import_module(f'kd_mm.{name}')
        yield module
        for info in pkgutil.iter_modules(getattr(module, '__path__', ())):
            yield importlib.import_module(f'kd_mm.{name}.{info.name}')


def test_choices_are_the_registered_classes_of_a_kind():
    assert {'CWDLoss', 'FGDLoss', 'FitNetLoss', 'MGDLoss', 'PKDLoss', 'SigmoidKDLoss', 'SoftmaxKDLoss'} <= set(
        choices(KDLoss))
    assert {'ConvAdapter', 'NormAdapter', 'ResizeAdapter', 'SequentialAdapter'} <= set(choices(Adapter))
    assert {'GTBoxRegion', 'SegClassRegion'} <= set(choices(RegionMask))
    assert {'ConstantSchedule', 'CosineSchedule', 'LinearWarmup', 'WindowSchedule'} <= set(choices(Schedule))
    assert choices(KDLoss) == sorted(choices(KDLoss)) and 'ConvAdapter' not in choices(KDLoss)


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
        assert 'mmdet' not in vars(module) and 'mmseg' not in vars(module)
