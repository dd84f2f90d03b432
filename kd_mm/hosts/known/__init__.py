"""The hosts that kd_mm knows: one file each; and those of other packages, by their entry points."""

from importlib import metadata

from mmengine.logging import print_log

from kd_mm.hosts.table import GROUP, Host, drop_incomplete, register
from kd_mm.registry import HOSTS, discover

discover(__name__, __path__, HOSTS)

_added = []
for _point in metadata.entry_points(group=GROUP):
    try:
        _found = _point.load()
        if isinstance(_found, Host):
            _added.append(register(_found).scope)
    except Exception as error:  # of another package, which must not keep the hosts of everybody from working
        print_log(f'kd_mm: the host {_point.name!r} ({_point.value}, an entry point of {GROUP}) cannot be added: '
                  f'{type(error).__name__}: {error}', 'current', level=30)

for _scope, _why in drop_incomplete(_added).items():
    print_log(f'kd_mm: the host {_scope!r}, of an entry point of {GROUP}, is left out: {_why}', 'current', level=30)
