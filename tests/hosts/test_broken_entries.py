"""Entries of a host that are written wrongly: told when they are made, not read by their letters later."""

import pytest
from foreign import Foreign

from kd_mm.hosts.table import Host, drop_incomplete, hosts, register


@pytest.fixture
def foreign(tmp_path):
    packages = Foreign(tmp_path / 'site')
    yield packages
    packages.forget()


@pytest.mark.parametrize(('field', 'value', 'said'), [
    ('versions', '1.0', "such as ('1.0', '2.0')"),
    ('versions', ('1.0', ), "such as ('1.0', '2.0')"),
    ('needs', 'scipy', 'must be a tuple of packages'),
    ('logits', ['MyHead'], 'must be a dict from a class to'),
    ('logits', {'MyHead': 'scores'}, 'must be a dict from a class to'),
    ('logits', {'MyHead': ('scores', None)}, 'must be a dict from a class to'),
    ('no_logits', 'MyHead', 'must be a tuple of classes'),
    ('backbones', {'MyNet': 'first'}, 'a function of'),
    ('branches', {'boxes': 'boxx'}, "one of 'class', 'objectness', 'box', 'distribution', 'quality'"),
    ('only_of', {'boxes': 'MyHead'}, 'to a tuple of classes'),
    ('sample', 'make', 'must be a function'),
    ('parent', 3, 'must be the scope of another host'),
    ('parent', 'mmfish', 'must be the scope of another host')])
def test_a_field_of_another_form_is_refused(field, value, said):
    with pytest.raises(ValueError) as caught:
        Host('mmfish', **{'parent': 'mmdet', field: value})
    assert str(caught.value).startswith(f"Host 'mmfish': {field}=") and said in str(caught.value)


def test_parents_in_a_circle_are_named(foreign):
    foreign.names += ['mmfish', 'mmsea']
    register(Host('mmfish', parent='mmsea'))
    register(Host('mmsea', parent='mmfish'))
    with pytest.raises(ValueError, match='its parents go in a circle, mm.* -> mm.* -> mm.*must have no parent'):
        hosts()


def test_an_entry_without_its_parent_does_not_stop_the_others(foreign):
    foreign.names += ['mmfish', 'mmsea']
    register(Host('mmfish', parent='mmnowhere'))
    register(Host('mmsea', parent='mmdet'))
    with pytest.raises(ValueError, match="its parent 'mmnowhere' is not in the table"):
        hosts()
    assert list(drop_incomplete(['mmfish', 'mmsea'])) == ['mmfish']
    assert {'mmdet', 'mmseg', 'mmsea'} <= {host.scope for host in hosts()}
