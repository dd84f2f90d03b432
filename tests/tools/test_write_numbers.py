"""The numbers of README.md and docs/ are those of the JSON files, and there are no others."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / 'tools' / 'studies'), str(ROOT / 'tools' / 'dev')]

import demo_numbers  # noqa: E402
import write_numbers  # noqa: E402


def test_every_page_is_what_the_files_make():
    assert write_numbers.main(['--check']) == 0
    named = {name for page in write_numbers.PAGES for name, _ in write_numbers.BLOCK.findall((ROOT / page).read_text())}
    assert named == set(write_numbers.WRITERS)


@pytest.mark.parametrize('data, task, pages', [
    ('demo', 'detection', ['README.md', 'docs/results.md']), ('bccd', 'bccd', ['docs/results.md'])])
def test_another_score_makes_pages_old(data, task, pages, tmp_path, monkeypatch, capsys):
    content = json.loads(write_numbers.FILES[data].read_text())
    content[task]['roles']['distilled'] = dict(scores={'0': 60.0, '1': 61.0})
    content[task].pop('gain', None)
    (tmp_path / 'results.json').write_text(json.dumps(content))
    monkeypatch.setitem(write_numbers.FILES, data, tmp_path / 'results.json')
    assert write_numbers.main(['--check']) == 1
    assert re.findall(r'not up to date: (\S+)', capsys.readouterr().out) == pages


#: What the studies write into pages of their own; each has a test that the page is what its results say.
WRITTEN = re.compile(r'<!-- (?:growing|table): written by `python tools/studies/.*?<!-- end of \w+ -->'
                     r'|<!-- variants: begin -->.*?<!-- variants: end -->', re.DOTALL)


def test_no_score_stands_outside_of_the_blocks():
    """Scores of ours; the pages have none of others."""
    for page in [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]:
        text = WRITTEN.sub('', write_numbers.BLOCK.sub('', page.read_text()))
        found = re.findall(r'.*(?:\d ± \d|\d\.\d (?:mAP|mIoU)|\d\.\d standard dev).*', text)
        assert found == [], page.name


def test_every_file_names_how_it_was_made():
    for path in ('demo/results.json', 'real/results.json', 'profile/results.json', 'profile/speed.json',
                 'profile/mmrazor.json', 'profile/scaling.json'):
        text = (ROOT / 'configs' / path).read_text()
        entries = [json.loads(found) for found in re.findall(r'"made": (\{(?:[^{}]|\{[^{}]*\})*\})', text)]
        assert entries
        for made in entries:
            assert made['command'] and {'python', 'versions', 'machine'} <= set(made) and 'processor' in made['machine']
        assert not re.search(r'(?<![\w.)])/\w|[A-Z]:\\', text)  # no absolute path


def test_rows_on_pretrained_backbones(tmp_path):
    """Students of the same seeds in pairs, from three seeds on; bold where the interval says better."""
    def runs(*scores):
        return {str(seed): dict(score=score) for seed, score in enumerate(scores)}

    def rows(ours, **others):
        pair = dict(runs={'teacher': runs(44.0, 46.0), 'plain': runs(37.0, 38.0, 36.0, 50.0), 'recipe:auto': ours,
                          **others}, cost={}, errors={}, recipe='mimic')
        (tmp_path / 'det').mkdir(exist_ok=True)
        (tmp_path / 'det' / 'benchmark.json').write_text(json.dumps(dict(pairs=dict(lite_gfl=pair))))
        return write_numbers.pretrained(tmp_path).splitlines()[2:]

    assert rows(runs(40.0, 41.0)) == []
    assert rows(runs(40.0, 41.5, 39.5)) == [
        '| GFL with ImageNet backbones on blood cells (BCCD) | COCO mAP | 45.0 ± 1.4 | 37.0 ± 1.0 | **40.3 ± 1.0** | '
        '`mimic` | +3.3 [+2.6, +4.1] | 3 | better |']
    # what was the same training counts, and what was not does not
    assert '| **40.3 ± 1.0** |' in rows(runs(40.0), mimic=runs(40.0, 41.5, 39.5))[0]
    assert rows(runs(40.1), mimic=runs(40.0, 41.5, 39.5)) == [] == rows({}, mimic=runs(40.0, 41.5, 39.5))
    row, = rows(runs(36.0, 41.5, 36.0))
    assert row.endswith('| 37.8 ± 3.2 | `mimic` | +0.8 [-5.0, +6.7] | 3 | no difference shown |')


def results(**roles):
    runs = [dict(role=role, seed=seed, score=score) for role, scores in roles.items()
            for seed, score in enumerate(scores)]
    return dict(detection=dict(title='GFL', metric='coco/bbox_mAP', quick=False, runs=runs))


def test_a_run_is_stored_beside_other_tasks(tmp_path):
    path = tmp_path / 'results.json'
    path.write_text(json.dumps(dict(segmentation=dict(metric='mIoU'))))
    made = dict(command='make demo', python='3', versions={}, machine=dict(processor='one'))
    demo_numbers.store(path, results(teacher=[50.0], student=[40.0, 42.0], distilled=[45.0, 47.0]), made)
    content = json.loads(path.read_text())
    assert sorted(content) == ['detection', 'segmentation'] and content['detection']['made'] == made
    entry = content['detection']
    roles = demo_numbers.roles_of(entry)
    assert [str(roles[name]) for name in ('teacher', 'student', 'distilled')] == ['50.0', '41.0 ± 1.4', '46.0 ± 1.4']
    assert write_numbers.gain(entry) == 5 and write_numbers.closed(entry) == pytest.approx(100 * 5 / 9)
    assert '| +5.0 | 56 % |' in write_numbers.row('detection', entry)
    assert str(demo_numbers.Role(dict(mean=46.6, spread=0.4, count=3))) == '46.6 ± 0.4'
    worse = dict(entry, gain=-1.0)
    assert write_numbers.closed(worse) is None and '**' not in write_numbers.row('detection', worse)


def test_measurements_of_two_machines_are_two_tables(tmp_path, monkeypatch):
    def found(pair, height, machine):
        part = dict(low=0.7, median=0.75, high=0.8)
        return dict(pair=pair, shape=[height, 96], batch=2, threads=1, clock='cpu', torch='2.9',
                    ms=dict(host=dict(part, median=1500.0)), ratios=dict(auto=part, step=part, implied=part),
                    made=dict(machine=dict(processor=machine)))

    lower = found('retinanet-r18', 64, 'two')
    lower['ratios']['bf16'] = dict(low=0.4, median=0.45, high=0.5)
    (tmp_path / 'speed.json').write_text(json.dumps([
        found('pspnet-r18', 64, 'one'), found('retinanet-r18', 64, 'one'), found('pspnet-r18', 128, 'one'), lower,
        found('pspnet-r18', 64, 'two')]))
    monkeypatch.setattr(write_numbers, 'PROFILE', tmp_path)
    lines = write_numbers.teacher_speed().splitlines()
    assert [line.split(' | ')[:3] for line in lines if line.startswith('| ')] == [
        ['| pair', 'images', 'host, s'], ['| RetinaNet R18 from R101', '2 x 64 x 96', '1.50'],
        ['| PSPNet R18 from R101', '2 x 128 x 96', '1.50'], ['| PSPNet R18 from R101', '2 x 64 x 96', '1.50'],
        ['| pair', 'images', 'host, s'], ['| RetinaNet R18 from R101', '2 x 64 x 96', '1.50'],
        ['| PSPNet R18 from R101', '2 x 64 x 96', '1.50']]
    assert [line for line in lines if line.endswith(':')] == [
        'one, 1 thread(s), torch 2.9, time of the processor:', 'two, 1 thread(s), torch 2.9, time of the processor:']
    assert lines[4].endswith('| 0.75 (0.70 to 0.80) | 0.75 (0.70 to 0.80) | 0.75 (0.70 to 0.80) |')
    assert lines[-2].endswith('| 0.75 (0.70 to 0.80) | 0.45 (0.40 to 0.50) |') and lines[-1].endswith(' |  |')


def test_the_table_beside_mmrazor(tmp_path, monkeypatch):
    (tmp_path / 'mmrazor.json').write_text(json.dumps([dict(
        shape=[64, 96], batch=2, threads=1, made=dict(machine=dict(processor='one')),
        peak_bytes={'plain': 2**20, 'MMRazor fpn': 3 * 2**20}, ms={
            'plain': [500.0, 600.0, 700.0], 'MMRazor fpn': [1000.0, 1000.0, 1000.0]})]))
    monkeypatch.setattr(write_numbers, 'PROFILE', tmp_path)
    lines = write_numbers.against_mmrazor().splitlines()
    assert lines[0] == '2 images of 64 x 96, 1 thread(s), one:'
    assert lines[4:] == ['| plain | 0.60 | 0.60 (0.50 to 0.70) | 1 |',
                         '| MMRazor fpn | 1.00 | 1.00 (1.00 to 1.00) | 3 |']
