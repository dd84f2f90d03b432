#!/usr/bin/env python3
"""Forwarder of an old name, for one release: tools/measure.py."""

import sys

if __name__ == 'profile':
    # The folder of a running script comes first on Python's path, so that `import profile` of the standard library
    # (cProfile does it, and torch imports cProfile) finds this file.  Hand over to the module that is meant.
    import importlib.machinery
    import importlib.util
    import os

    _here = os.path.dirname(os.path.abspath(__file__))
    _spec = importlib.machinery.PathFinder.find_spec(
        'profile', [path for path in sys.path if os.path.abspath(path or os.curdir) != _here])
    assert _spec is not None and _spec.loader is not None
    sys.modules['profile'] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules['profile'])
elif __name__ == '__main__':
    import measure

    print('tools/profile.py is now tools/measure.py', file=sys.stderr)
    sys.exit(measure.main())
