"""The scores of ``tools/studies/demo.py`` as JSON: in its work dir, and by ``--record`` in the repository.

The tables of README.md and docs/results.md are made of the files in the repository, by ``tools/dev/write_numbers.py``.
"""

import json
import statistics
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

ROOT = Path(__file__).resolve().parents[2]
#: By the name of the data.
FILES = {'demo': ROOT / 'configs' / 'demo' / 'results.json', 'bccd': ROOT / 'configs' / 'real' / 'results.json',
         'camvid': ROOT / 'configs' / 'real' / 'results.json'}


def store(path: Path, results: Mapping[str, Mapping[str, Any]], made: Mapping[str, Any]) -> None:
    """Add the scores of some tasks to a file; those of other tasks stay.

    Args:
        path: the file.
        results: what ``demo_report.collect`` gives.
        made: command, versions and machine.
    """
    content = json.loads(path.read_text()) if path.exists() else {}
    for key, entry in results.items():
        roles: Dict[str, Dict[str, Any]] = {}
        for run in entry['runs']:
            role = roles.setdefault(run['role'], dict(scores={}))
            role['scores'][str(run['seed'])] = round(run['score'], 2)
        content[key] = dict(metric=entry['metric'], quick=entry['quick'], made=dict(made), roles=roles)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(content.items())), indent=1) + '\n')


class Role:
    """The scores of teacher, plain or distilled student.

    Args:
        content: ``scores`` by seed; or ``mean``, ``spread`` and ``count`` where single scores were not kept.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.scores = list(content.get('scores', {}).values())
        self.mean: float = statistics.fmean(self.scores) if self.scores else content['mean']
        self.count: int = len(self.scores) or content['count']
        self.spread: Optional[float] = content.get('spread')
        if len(self.scores) > 1:
            self.spread = statistics.stdev(self.scores)

    def __str__(self) -> str:
        return f'{self.mean:.1f}' + ('' if self.spread is None else f' ± {self.spread:.1f}')


def roles_of(entry: Mapping[str, Any]) -> Dict[str, Role]:
    """The three of a task in a file."""
    return {name: Role(content) for name, content in entry['roles'].items()}
