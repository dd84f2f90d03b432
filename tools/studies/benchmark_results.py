"""What ``tools/studies/benchmark.py`` has measured: ``configs/<task>/benchmark.json``, and what the numbers show."""

import json
import re
import statistics
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import stages as engine
from benchmark_plan import AUTO, CODE, LONGER, Run
from sources import losses_hash

from kd_mm.lab.commands.compare import Group, difference, verdict


class Book:
    """``benchmark.json``: where and how each result was made, and the results of each pair.

    Args:
        path: the file.

    Attributes:
        made: commands with versions and machine; a result has the index of its own in ``made``.
        hosts: versions that results without such an index were made with.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = json.loads(path.read_text()) if path.exists() else {}
        self.hosts, self.pairs = content.get('hosts', {}), content.get('pairs', {})
        self.made: List[Dict[str, Any]] = content.get('made', [])
        self.current: Optional[int] = None

    def start(self, provenance: Dict[str, Any]) -> None:
        """What is added from now on was made so."""
        if provenance not in self.made:
            self.made.append(provenance)
        self.current = self.made.index(provenance)

    def merge(self, other: 'Book') -> int:
        """Add the results of another file, such as one of another machine; for the same row and seed that of the other
        replaces the own one.

        Returns:
            int: how many trainings were added.
        """
        places = []
        for provenance in other.made:
            self.start(provenance)
            places.append(self.current)
        self.current, count = None, 0
        for name, pair in other.pairs.items():
            own = self.pairs.setdefault(name, dict(runs={}, cost={}, errors={}))
            for row, runs in pair['runs'].items():
                for seed, run in runs.items():
                    run = dict(run, made=places[run['made']]) if 'made' in run else dict(run)
                    own['runs'].setdefault(row, {})[seed] = run
                    count += 1
                own['errors'].pop(row, None)
            own['cost'].update(pair['cost'])
            own['errors'].update({row: why for row, why in pair['errors'].items() if row not in own['runs']})
            own.update({part: pair[part] for part in ('recipe', 'trials') if part in pair})
        return count

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        pairs = {name: {part: dict(sorted(content.items())) if isinstance(content, dict) else content
                        for part, content in parts.items()} for name, parts in self.pairs.items()}
        partial = self.path.with_suffix('.part')
        content = dict(hosts=self.hosts, made=self.made, pairs=pairs)
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + '\n')
        partial.replace(self.path)


class Results:
    """``runs`` of one pair by row and seed, ``cost`` and ``errors`` by row; saved after every change."""

    def __init__(self, book: Book, pair: str) -> None:
        self.book = book
        self.data = book.pairs.setdefault(pair, dict(runs={}, cost={}, errors={}))

    def save(self) -> None:
        self.book.save()

    def record(self, stage: Run) -> Optional[Dict[str, Any]]:
        """What there is of a training with the same settings."""
        found: Optional[Dict[str, Any]] = self.data['runs'].get(stage.name, {}).get(str(stage.seed))
        return found if found is not None and found['hash'] == stage.config_hash else None

    def has(self, stage: Run) -> bool:
        """Whether there is the result of a training, of a student with the teacher that there is."""
        found, teacher = self.record(stage), stage.teacher
        if found is None or teacher is None:
            return found is not None
        source = self.record(teacher)
        return source is not None and source.get('weights') == found.get('teacher')

    def renew(self, stages: Sequence[Any]) -> List[str]:
        """Drop the result of a teacher whose checkpoint is not here, if a student is still to learn from it.

        Trained anew, on another machine for instance, it is another teacher, and students that learned from two
        teachers cannot be compared: all its students are trained anew.

        Returns:
            list[str]: what is to be said about it.
        """
        said = []
        for teacher in [stage for stage in stages if isinstance(stage, Run) and stage.name == 'teacher']:
            students = [stage for stage in stages if isinstance(stage, Run) and stage.teacher is teacher]
            found = self.record(teacher)
            if found is None or all(map(self.has, students)) or found.get('weights', '') == teacher.weights():
                continue
            old = sum(map(self.has, students))
            del self.data['runs'][teacher.name][str(teacher.seed)]
            if old:
                said.append(f'{teacher.title}: the checkpoint of its result is not in {teacher.work_dir}; so that all '
                            f'students of this seed learn from the same, {old} of them are trained anew, too')
            for stage in stages:
                if teacher in stage.needs:
                    stage.stamp.unlink(missing_ok=True)
        return said

    def add(self, stage: Run, metric: str, engine_code: str = '') -> None:
        """Read what a finished training wrote."""
        train, val = engine.read_scalars(stage.work_dir)
        scores = [row[metric] for row in val if metric in row]
        if not scores:
            raise engine.StageError(f'{stage.title}: no {metric} in the logs below {stage.work_dir}')
        ratios = [row['kd_task_ratio'] for row in train if 'kd_task_ratio' in row]
        record: Dict[str, Any] = dict(score=round(100 * scores[-1] if metric.startswith('coco/') else scores[-1], 2),
                                      hash=stage.config_hash)
        if stage.name == 'teacher':
            record['weights'] = stage.weights()
        elif stage.teacher is not None:
            record['teacher'] = stage.teacher.weights()
        if ratios:
            record['kd_task_ratio'] = round(statistics.median(ratios), 4)
        if stage.code:
            record.update(code=stage.code[:CODE], engine=engine_code[:CODE])
        if self.book.current is not None:
            record['made'] = self.book.current
        self.data['runs'].setdefault(stage.name, {})[str(stage.seed)] = record
        self.data['errors'].pop(stage.name, None)
        self.save()

    def score(self, stage: Run) -> float:
        return self.data['runs'][stage.name][str(stage.seed)]['score']

    def scores(self, name: str) -> List[float]:
        return [run['score'] for _, run in sorted(self.data['runs'].get(name, {}).items())]

    def group(self, name: str) -> Group:
        """The seeds and scores of a row."""
        return Group(name, [(int(seed), run['score']) for seed, run in sorted(self.data['runs'].get(name, {}).items())])

    # -----------------------------------------------------------------------------------------------------------------

    def gain(self, name: str, against: str = 'plain') -> Optional[Tuple[float, Optional[float], int]]:
        """Mean difference to another row over the seeds that both have, half of its 95 % interval, and their number.

        Students with the same seed start from the same weights and see the same pictures, so they are compared in
        pairs: Student's t of the differences.
        """
        one, two = self.group(against), self.group(name)
        shared = {seed for seed, _ in one.scores} & {seed for seed, _ in two.scores}
        if not shared:
            return None
        pair = [Group(group.name, [item for item in group.scores if item[0] in shared]) for group in (one, two)]
        mean, half, _ = difference(*pair)
        return mean, half, len(shared)

    def verdict(self, name: str, against: str = 'plain') -> str:
        """*better*, *no difference shown* or *worse*; or that there are too few seeds to say so."""
        found = self.gain(name, against)
        return '' if found is None else 'one seed' if found[1] is None else verdict(found[0], found[1])

    def cost(self, name: str) -> Optional[Dict[str, Any]]:
        """Time and memory of a row; with measured weights those of the same method with its own."""
        found = self.data['cost'].get(name) or self.data['cost'].get(name.removesuffix(AUTO))
        return None if not found or 'error' in found else found

    def equal_time(self, name: str) -> Optional[Tuple[float, Optional[float], int, float]]:
        """As :meth:`gain`, against the plain student that was trained at least as long as this row takes.

        Returns:
            mean, half of the interval, seeds, and how many times the plain student's steps that one had; None where
            none was trained so long.
        """
        cost = self.cost(name)
        if cost is None:
            return None
        ratio = cost['kd_ms'] / cost['plain_ms']
        factors = sorted(float(row.removeprefix(LONGER)) for row in self.data['runs'] if row.startswith(LONGER))
        for factor in factors:
            if factor >= ratio:
                found = self.gain(name, f'{LONGER}{factor:g}')
                return None if found is None else (*found, factor)
        return None

    def percentile(self, name: str, others: List[str]) -> Optional[float]:
        """Percent of the other rows whose mean is at or below that of this one."""
        scores = self.scores(name)
        means = [statistics.fmean(self.scores(other)) for other in others if self.scores(other)]
        if not scores or not means:
            return None
        return 100 * sum(mean <= statistics.fmean(scores) for mean in means) / len(means)

    def filled(self, name: str, note: str) -> str:
        """A sentence about a row with its numbers: ``{run.SEED}`` of the table, ``{LABEL.SEED}`` and
        ``{LABEL.ratio}`` of ``trials``, what was tried besides.

        Raises:
            KeyError: there is no such number.
        """
        def number(found: 're.Match[str]') -> str:
            label, key = found.groups()
            if label == 'run':
                return f'{self.data["runs"][name][key]["score"]:.1f}'
            trial = self.data['trials'][name][label]
            return f'{trial["kd_task_ratio"]}' if key == 'ratio' else f'{trial["scores"][key]:.1f}'

        return re.sub(r'\{(\w+)\.(\w+)\}', number, note)

    def strangers(self) -> List[str]:
        """The rows with a student of another teacher than the one of its seed in the table."""
        runs = self.data['runs']
        teachers = [run['weights'] for run in runs.get('teacher', {}).values() if run.get('weights')]
        return [name for name, found in sorted(runs.items())
                if any(run.get('teacher', teachers[0]) not in teachers for run in found.values() if teachers)]

    def outdated(self, entries: Mapping[str, Mapping[str, Any]]) -> List[str]:
        """The rows that were measured with another code of their losses than today's."""
        found = []
        for name, entry in entries.items():
            codes = {run['code'] for run in self.data['runs'].get(name, {}).values() if run.get('code')}
            if codes and entry.get('losses') and codes != {losses_hash(entry['losses'])[:CODE]}:
                found.append(name)
        return found
