#!/usr/bin/env python3
"""Write the stubs of a new method: all places that the tests of the house ask for.

    python tools/dev/new_method.py my_method --task seg
    python tools/dev/new_method.py my_method --task det --name MyMethodLoss --title "My method (Authors, Paper, 2026)"

What is written runs: the loss is a mean squared difference, and every test that sweeps over the methods passes.  Where
the method's own formula, numbers and sources belong stands FILL IN; the command lists these places.  Nothing is
overwritten: if one of the files is there already, none is written.

    kd_mm/losses/NAME.py              the loss: a function, and a class over it
    tests/losses/test_NAME.py         a closed form by hand
    configs/TASK/NAME/                a config and the card
    configs/benchmark/TASK.py         a line: the method is not measured yet
    the recipe of its golden vectors  compares once a vector of the authors' code is recorded
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).resolve().parents[2]
#: By task: the name of the config after that of the method, what it says about the pair, and the place to tap.
MODELS = {
    'det': ('retinanet_r50_from_r101_2x_coco.py', 'RetinaNet R50 from R101', 'neck'),
    'seg': ('pspnet_r18_from_r101_80k_cityscapes.py', 'PSPNet R18 from R101', 'decode_head.bottleneck'),
}
#: The method whose files show where things are imported from, and whose configs are taken as the pattern.
PATTERN = 'fitnet'

LOSS = '''"""FILL IN: the method in one line."""

from typing import Any, Optional

from torch import Tensor

{imports}


def {name}_gap(student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """FILL IN: what is computed.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        mask: weights (N, 1, H, W) or None.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> {name}_gap(torch.full((1, 2, 2, 2), 3.0), torch.zeros(1, 2, 2, 2))
        tensor(9.)
    """
    return weighted_mean((student - teacher).square(), mask)  # FILL IN: the formula


@MODELS.register_module()
class {cls}(KDLoss):
    """{title}.

    ``mean((F_s - F_t)^2)``: FILL IN the formula, with every symbol.

    As published: FILL IN where the published codes differ, and which options give each of them.

    Args:
        loss_weight: see :class:`KDLoss`. Default 1 [ours]. FILL IN the value with its source.

    A region weights the cells.

    Returns:
        Reduction: per level; mean over elements
        Summed over levels.

    Example:
        >>> import torch
        >>> from kd_mm.registry import build
        >>> build(dict(type='{cls}'))(torch.full((1, 4, 3, 3), 2.0), torch.zeros(1, 4, 3, 3))
        tensor(4.)
    """

    takes = (4, )  # maps; with 2 rows of proposals, with 3 tokens too

    def __init__(self, loss_weight: Any = 1.0):
        super().__init__(loss_weight)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, batch: KDBatch,
                   mask: Optional[Tensor]) -> Tensor:
        return {name}_gap(student, teacher, mask)
'''

TEST = '''import pytest
import torch

from kd_mm.losses.{name} import {name}_gap as gap
from kd_mm.registry import build


def value(student, teacher, **options):
    return build(dict(dict(type='{cls}', loss_weight=1.0), **options))(student, teacher).item()


def test_closed_form():
    # FILL IN: numbers worked out by hand from the paper's formula, one row an option.
    student, teacher = torch.full((2, 4, 2, 3), 5.0).double(), torch.full((2, 4, 2, 3), 2.0).double()
    assert value(student, teacher) == pytest.approx(9.0, rel=1e-12)
    assert value(student, teacher, loss_weight=0.5) == pytest.approx(4.5, rel=1e-12)


def test_region_is_the_loss_of_its_cells():
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    mask = torch.zeros(2, 1, 4, 5).double()
    mask[:, :, 1:3, :4] = 1
    part = gap(student[:, :, 1:3, :4], teacher[:, :, 1:3, :4])
    assert torch.isclose(gap(student, teacher, mask), part, rtol=1e-12)
'''

CARD = '''# {title}

FILL IN: authors, *paper*, venue. Loss: `{cls}`.

## What it computes

`w * mean((F_s - F_t)^2)` over images, channels and cells. FILL IN: the formula in words.

It taps `{at}` and needs no labels.

## Configs

| config | student from teacher | weight |
|---|---|---|
| `{config}` | {pair} | 1 |

FILL IN: where taps and weights come from.

## Results

None are published. Our own: [on small data](../README.md).

## Traps

- FILL IN: what a user should know before he trusts a number.
'''

RECIPE = '''"""FILL IN: the method."""

{imports}


@recipe('{name}')
def {name}(v: Vector) -> None:
    """FILL IN: compare every number of {name}.npz in tests/golden/{task}; nothing is compared until it is recorded."""
    v.run(dict(type='{cls}', loss_weight=v.number('loss_weight', default=1.0)))
'''


def imports(path: Path, *names: str) -> str:
    """The lines by which a file imports these names, each name from its own module."""
    text = path.read_text()
    found: Dict[str, List[str]] = {}
    for name in names:
        line = re.search(rf'^from (\S+) import .*\b{name}\b', text, re.MULTILINE)
        assert line is not None, f'{path} does not import {name}'
        found.setdefault(line.group(1), []).append(name)
    return '\n'.join(f'from {module} import {", ".join(sorted(found[module]))}' for module in sorted(found))


def config(task: str, name: str, cls: str) -> str:
    """The pattern's config with the new loss."""
    pair, _, at = MODELS[task]
    lines = (ROOT / 'configs' / task / PATTERN / f'{PATTERN}_{pair}').read_text().splitlines()
    last = next(index for index, line in enumerate(lines) if 'teacher_ckpt=' in line)
    return '\n'.join([
        f'# {name}: FILL IN. Card: README.md in this folder.', *lines[1:last + 1],
        f"        losses=dict(loss_{name}=dict(", f"            type='{cls}', at='{at}', loss_weight=1.0)))", ']', ''])


def benchmark(task: str, name: str) -> str:
    """The benchmark's methods with the new one among those that are left out."""
    start = 'left_out = dict(\n'
    text = (ROOT / 'configs' / 'benchmark' / f'{task}.py').read_text()
    assert text.count(start) == 1, f'configs/benchmark/{task}.py has no `left_out = dict(` on a line of its own'
    return text.replace(start, f"{start}    {name}='FILL IN: not measured yet; measure it, or say why not',\n")


def stubs(name: str, cls: str, title: str, task: str) -> Dict[Path, str]:
    """Path -> content of every new file."""
    recipes = next(folder for folder in sorted(ROOT.glob('*/*')) if (folder / 'vector.py').is_file())
    suffix, pair, at = MODELS[task]
    file = f'{name}_{suffix}'
    values = dict(name=name, cls=cls, title=title, task=task, config=file, pair=pair, at=at)
    losses = ROOT / 'kd_mm' / 'losses'
    folder = ROOT / 'configs' / task / name
    return {
        losses / f'{name}.py': LOSS.format(
            imports=imports(losses / f'{PATTERN}.py', 'weighted_mean', 'KDLoss', 'MODELS', 'KDBatch'), **values),
        ROOT / 'tests' / 'losses' / f'test_{name}.py': TEST.format(**values),
        folder / file: config(task, name, cls),
        folder / 'README.md': CARD.format(**values),
        recipes / f'{name}.py': RECIPE.format(
            imports=imports(recipes / f'{PATTERN}.py', 'Vector', 'recipe'), **values),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('method', help='name of the files: small letters, digits and underscores')
    parser.add_argument('--task', choices=sorted(MODELS), required=True, help='which host its config is for')
    parser.add_argument('--name', help='class; default: from the method, my_method -> MyMethodLoss')
    parser.add_argument('--title', help='first line of the docstring and of the row in the list of methods')
    args = parser.parse_args()
    if not re.fullmatch(r'[a-z][a-z0-9_]*', args.method):
        parser.error(f'{args.method!r}: small letters, digits and underscores, and a letter first')
    cls = args.name or ''.join(part.title() for part in args.method.split('_')) + 'Loss'
    if not re.fullmatch(r'[A-Z][A-Za-z0-9]*Loss', cls):
        parser.error(f'{cls!r}: the class of a loss is called ...Loss')
    title = (args.title or f'{args.method} (FILL IN: authors, paper, venue)').rstrip('.')

    files = stubs(args.method, cls, title, args.task)
    there = [path for path in files if path.exists()]
    there += [path for path in (ROOT / 'kd_mm' / 'losses').rglob('*.py') if f'class {cls}(' in path.read_text()]
    if there:
        names = dict.fromkeys(str(path.relative_to(ROOT)) for path in there)
        parser.error(f'nothing was written; there is already {", ".join(names)}')
    files[ROOT / 'configs' / 'benchmark' / f'{args.task}.py'] = benchmark(args.task, args.method)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    subprocess.run([sys.executable, str(ROOT / 'tools' / 'dev' / 'metafiles.py')], check=True, cwd=ROOT,
                   stdout=subprocess.DEVNULL)

    print('written, and the metafiles; fill in:')
    for path, text in files.items():
        for number, line in enumerate(text.splitlines(), 1):
            if 'FILL IN' in line and (args.method in path.parts or args.method in path.stem or args.method in line):
                print(f'  {path.relative_to(ROOT)}:{number}: {line.strip()}')
    print(f'then: python -m pytest tests/losses tests/test_layering.py -k "{args.method} or {cls}"')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
