#!/usr/bin/env python3
"""Write ``model-index.yml`` and ``configs/TASK/METHOD/metafile.yml`` from the configs and their cards.

    python tools/dev/metafiles.py            writes what is not as it should be
    python tools/dev/metafiles.py --check    only says so

They are what ``mim search kd_mm`` reads.  No results stand in them: none of these configs was trained to its end by us
(what we measured, on small data, is in configs/det/README.md and configs/seg/README.md), and no weights are published.
"""

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
TASKS = {'det': 'Object Detection', 'seg': 'Semantic Segmentation'}
#: The part of a config's name that says what it is trained on -> the data set.
DATA = {'coco': 'COCO', 'cityscapes': 'Cityscapes', 'ade20k': 'ADE20K', 'voc12aug': 'Pascal VOC 2012 + Aug'}
NOTE = '# Written by `python tools/dev/metafiles.py`; do not edit.\n'


def hook_of(path: Path) -> Tuple[str, List[str]]:
    """The teacher and the types of the losses of a config; it is not run."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Call):
            entry = {keyword.arg: keyword.value for keyword in node.keywords}
            source = entry.get('teacher', entry.get('teachers'))
            if source is not None and 'losses' in entry:
                losses = [str(loss.value.value) for inner in ast.walk(entry['losses']) if isinstance(inner, ast.keyword)
                          and (inner.arg or '').startswith('loss_') and isinstance(inner.value, ast.Call)
                          for loss in inner.value.keywords
                          if loss.arg == 'type' and isinstance(loss.value, ast.Constant)]
                return (teacher_name(source),
                        [loss for loss in losses if loss.endswith('Loss')])
    raise ValueError(f'{path}: no entry with teacher and losses')


def teacher_name(value: ast.expr) -> str:
    """``teacher=`` or ``teachers=`` in words: configs, or the kind and the name of a foundation model."""
    if isinstance(value, ast.Call):  # dict(type='timm', name='...')
        parts = {keyword.arg: keyword.value for keyword in value.keywords}
        if 'type' not in parts:  # several, by names of the user's own
            entries = [{part.arg: part.value for part in one.keywords} for one in parts.values()
                       if isinstance(one, ast.Call)]
            return ', '.join(teacher_name(one['teacher']) for one in entries)
        return ' '.join(teacher_name(parts[key]) for key in ('type', 'name', 'config') if key in parts)
    assert isinstance(value, ast.Constant)
    return str(value.value)


def collection(folder: Path) -> Dict[str, str]:
    """A method, from its card."""
    path = folder / 'README.md'
    card = path.read_text(encoding='utf-8')
    title = re.split(r': | for ', card.splitlines()[0].removeprefix('# '))[0]
    shared = all((ROOT / 'configs' / other / folder.name).is_dir() for other in TASKS)
    entry = dict(Name=f'{title} {folder.parent.name}' if shared else title, README=path.relative_to(ROOT).as_posix())
    paper = re.search(r'\*([A-Z][^*]{15,})\*', card.split('## ')[0])
    if paper is not None:
        entry['Paper'] = ' '.join(paper.group(1).split())
    return entry


def metafile(folder: Path) -> str:
    """The content of a method's ``metafile.yml``."""
    method, models = collection(folder), []
    for path in sorted(folder.glob('*.py')):
        teacher, losses = hook_of(path)
        data = next(DATA[part] for part in path.stem.split('_') if part in DATA)
        models.append({
            'Name': path.stem, 'In Collection': method['Name'], 'Config': path.relative_to(ROOT).as_posix(),
            'Metadata': {'Task': TASKS[folder.parent.name], 'Training Data': data, 'Teacher': teacher,
                         'Losses': list(dict.fromkeys(losses))}})
    return NOTE + yaml.safe_dump(dict(Collections=[method], Models=models), sort_keys=False, width=120)


def wanted() -> Iterator[Tuple[Path, str]]:
    """Path and content of every file."""
    folders = [folder for task in TASKS for folder in sorted((ROOT / 'configs' / task).iterdir())
               if folder.is_dir() and any(folder.glob('*.py'))]
    for folder in folders:
        yield folder / 'metafile.yml', metafile(folder)
    imports = [f'{folder.relative_to(ROOT).as_posix()}/metafile.yml' for folder in folders]
    yield ROOT / 'model-index.yml', NOTE + yaml.safe_dump(dict(Import=imports), width=120)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; the exit status is 1 if something differs')
    args = parser.parse_args(argv)
    stale = [(path, text) for path, text in wanted()
             if not path.is_file() or path.read_text(encoding='utf-8') != text]
    for path, text in stale:
        print(f'{path.relative_to(ROOT)}: {"not as it should be" if args.check else "written"}')
        if not args.check:
            path.write_text(text, encoding='utf-8')
    return 1 if args.check and stale else 0


if __name__ == '__main__':
    sys.exit(main())
