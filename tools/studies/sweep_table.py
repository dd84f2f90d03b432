"""The table of configs/README.md, from what ``tools/studies/sweep.py`` found."""

import contextlib
from importlib import metadata
from typing import Any, Dict, Optional

from sweep_families import families

from kd_mm.hosts.packages import INSTALL, installed

KINDS = ('neck', 'backbone', 'logits')
NOT_THERE = 'no dense class logits'


def summary(families_: Dict[str, Dict[str, Any]]) -> str:
    tried = {name: record for name, record in families_.items() if 'left_out' not in record}
    trained = {name: record for name, record in tried.items() if 'refused' not in record}
    lines = [f'{len(families_)} configs: {len(families_) - len(tried)} left out, {len(tried) - len(trained)} do not '
             f'build or train by themselves, {len(trained)} distilled.']
    for kind in KINDS:
        values = [record['kinds'].get(kind) for record in trained.values()]
        there = [value for value in values if value != NOT_THERE]
        lines.append(f'{kind}: {there.count("ok")} of {len(there)}' + (
            f' ({len(values) - len(there)} have none)' if len(there) < len(values) else '') + '.')
    return ' '.join(lines)


def optional() -> str:
    """The optional packages of the hosts that are installed, with versions."""
    found = []
    for name in INSTALL:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f'{name} {metadata.version(name)}' if installed(name) else '')
    return ', '.join(filter(None, found))


def beside(known: Dict[str, Dict[str, Any]], results: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Records without optional packages, each with what was found with them."""
    return {**known, **{name: dict(known.get(name, {}), config=record['config'], **{'with': dict(
        packages=optional(), **{key: record[key] for key in ('kinds', 'refused') if key in record})})
        for name, record in results.items()}}


def with_packages(found: Optional[Dict[str, Any]]) -> str:
    """What a family did with optional packages of its host."""
    if not found:
        return ''
    kinds = found.get('refused') or ', '.join(f'{kind} {found["kinds"][kind]}' for kind in KINDS
                                              if kind in found['kinds'])
    return f'. With {found["packages"]}: {kinds}'


def render(data: Dict[str, Any]) -> str:
    lines = [
        '# Which families work', '',
        'Written by `python tools/studies/sweep.py` (or `make sweep`) from `tests/compat.json`; what is tried and what '
        '"ok" means is described there. Each config distils from a second copy of itself with other random weights, '
        'for two optimizer steps on a CPU.', '',
        f'Hosts: {", ".join(f"{name} {version}" for name, version in data["versions"].items())}.', '',
        summary(data['families']), '',
        '| family | config | model, heads | neck | backbone | logits |', '|---|---|---|---|---|---|']
    refused, left = [], []
    missing = [name for name, *_ in families() if name not in data['families']]
    if missing:
        lines[8:8] = [f'**Not tried yet** ({len(missing)}): {", ".join(missing)}.', '']
    for name, record in data['families'].items():
        if 'left_out' in record:
            left.append((name, record['left_out']))
        elif 'refused' in record:
            refused.append((name, record['config'], record['refused'] + with_packages(record.get('with'))))
        else:
            heads = [value for key, value in record['parts'].items() if key.endswith('_head') and key != 'mask_head']
            kinds = [record['kinds'].get(kind, '') for kind in KINDS]
            shown = ['-' if kind == NOT_THERE else kind.replace('|', '/') for kind in kinds]
            lines.append(f'| {name} | `{record["config"]}` | {record["model"]}: {", ".join(heads)} | '
                         + ' | '.join(shown) + ' |')
    lines += ['', '`-`: the head has no dense class logits.', '', '## Do not build or train by themselves', '',
              'The plain model, without kd_mm, on random images on a CPU:', '', '| family | config | reason |',
              '|---|---|---|']
    lines += [f'| {name} | `{config}` | {reason.replace("|", "/")} |' for name, config, reason in refused]
    lines += ['', '## Left out', '', '| family | reason |', '|---|---|']
    lines += [f'| {name} | {reason} |' for name, reason in left]
    return '\n'.join(lines) + '\n'
