"""Write ``configs/`` and ``tools/`` into an installation of kd_mm, as ``setup.py`` asks for it.

Below the package's folder:

    configs/**/NAME.py    every config, for ``with read_base(): from kd_mm.configs.det.fgd.NAME import *``, for
                          ``_base_ = '.../NAME.py'`` and for ``mim train kd_mm NAME.py``
    .mim/model-index.yml  what ``mim search kd_mm`` reads, with .mim/configs/**/metafile.yml
    .mim/configs/         cards and results
    .mim/tools/           train.py, test.py, ...

There is one file of each name: ``mim train`` looks through the whole package and refuses a name that it finds twice.
That file must serve both styles of mmengine, and a config with ``_base_`` cannot (``read_base()`` refuses it), so it
gets its base by a function: :func:`both_styles`.  Standard library only: it runs while a wheel is built.
"""

import ast
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: What of ``configs/`` is no config.
OTHERS = ('*.md', '*.yml', '*.json')
#: Tools that read the tests of the repository.
FOR_A_CHECKOUT = ('check_golden.py', )
HEAD = '''# Installed copy of configs/{relative} of the repository, which says {base}.
# Inherit from it by its path in _base_, or by `with read_base(): from {module} import *`.
__shipped__ = __import__('kd_mm.hosts.shipped', fromlist=['shipped'])
'''
LIVE = '''# Editable installation: reads configs/{relative} of the checkout.
globals().update(__import__('kd_mm.hosts.shipped', fromlist=['shipped']).live({path!r}))
'''


def both_styles(text: str, relative: str) -> str:
    """A text config without ``_base_`` and ``{{ fileDirname }}`` that has the same content.

    Args:
        text: of the config.
        relative: its path below ``configs``.

    Raises:
        ValueError: it has something that neither style shares and that is not known here.
    """
    base = next((node for node in ast.parse(text).body if isinstance(node, ast.Assign)
                 and isinstance(node.targets[0], ast.Name) and node.targets[0].id == '_base_'), None)
    lines, folder = text.splitlines(), Path(relative).parent.as_posix()
    if base is not None:
        value = ast.get_source_segment(text, base.value)
        lines[base.lineno - 1:base.end_lineno] = [f'__base__ = __shipped__.inherit(({value}), {folder!r})']
    body = re.sub(r'\b_base_\.', '__base__.', '\n'.join(lines))
    body = re.sub(r'''(['"])\{\{ *fileDirname *\}\}''', rf"__shipped__.folder('{folder}') + \1", body)
    left = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    if '{{' in body or left & {'_base_', 'read_base'}:
        raise ValueError(f'configs/{relative}: cannot be written for both styles of mmengine; teach it to '
                         'tools/dev/ship_configs.py')
    if body == text.rstrip('\n'):
        return text
    head = HEAD.format(relative=relative, base='_base_ = ...' if base else 'the same',
                       module='.'.join(['kd_mm', 'configs', *Path(relative).with_suffix('').parts]))
    end = ['', 'globals().update(__shipped__.merged(globals(), __base__))'] if base else []
    return '\n'.join([head.rstrip('\n'), '', body, *end, ''])


def write(package: Path, live: bool = False) -> None:
    """Write everything below the folder of the package.

    Args:
        package: ``kd_mm`` in a build folder.
        live: whether the configs are read from this checkout whenever they are used (an editable installation).
    """
    for folder in ('configs', '.mim'):
        shutil.rmtree(package / folder, ignore_errors=True)
    for path in sorted((ROOT / 'configs').rglob('*.py')):
        relative = path.relative_to(ROOT / 'configs').as_posix()
        target = package / 'configs' / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        text = LIVE.format(relative=relative, path=str(path)) if live else \
            both_styles(path.read_text(encoding='utf-8'), relative)
        target.write_text(text, encoding='utf-8')
    mim = package / '.mim'
    for pattern in OTHERS:
        for path in sorted((ROOT / 'configs').rglob(pattern)):
            target = mim / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    (mim / 'tools').mkdir()
    for path in sorted((ROOT / 'tools').iterdir()):
        if path.suffix in ('.py', '.sh') and path.name not in FOR_A_CHECKOUT:
            shutil.copy(path, mim / 'tools')
    shutil.copy(ROOT / 'model-index.yml', mim)
