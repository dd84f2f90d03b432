"""tools/studies/cost.py: what is grouped, measured once, resumed, noted when it fails, and written into the cards."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from ranks import forked

from kd_mm.hosts.zoo import zoo_config
from kd_mm.lab import cost as measuring
from kd_mm.lab.configs import hook_arguments, hook_entries, read_config
from kd_mm.lab.models import scope_of
from kd_mm.lab.recording import Recording
from kd_mm.ops.problems import Problems
from kd_mm.types.batch import KDBatch
from kd_mm.types.records import Call, Recorded

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools' / 'studies'))

import cost  # noqa: E402
import cost_cards  # noqa: E402

DET = 'retinanet_r50_from_r101_2x_coco.py'
SEG = 'pspnet_r18_from_r101_80k_cityscapes.py'
#: The shipped students and teachers with fewer channels and layers.
SMALL = {
    'det': {'backbone.depth': 18, 'backbone.base_channels': 8, 'backbone.stem_channels': 8,
            'neck.in_channels': [8, 16, 32, 64], 'neck.out_channels': 32, 'bbox_head.in_channels': 32,
            'bbox_head.feat_channels': 32},
    'seg': {'backbone.base_channels': 8, 'backbone.stem_channels': 8, 'decode_head.in_channels': 64,
            'decode_head.channels': 32, 'auxiliary_head.in_channels': 32, 'auxiliary_head.channels': 16}}
TEACHER = {'det': 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
           'seg': 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'}


def shipped(home, *methods, name):
    """Copies of some methods' folders, with one config each: METHOD_name."""
    for method in methods:
        source = ROOT / 'configs' / home.name / method
        (home / method).mkdir(parents=True)
        shutil.copy(source / f'{method}_{name}', home / method)
        card = cost_cards.MARKS.sub('', (source / 'README.md').read_text())
        (home / method / 'README.md').write_text(card)


def run(home, *extra):
    """The command with tiny images and networks, all in the folder ``home``."""
    task = home.name
    teacher = home.parents[1] / f'{task}_teacher.py'  # the same for all tests: it is part of the settings
    cfg = Config.fromfile(str(zoo_config(TEACHER[task])))
    cfg.merge_from_dict({f'model.{key}': value for key, value in SMALL[task].items()})
    teacher.write_text(f'default_scope = {cfg.default_scope!r}\nmodel = {cfg.model.to_dict()!r}\n')
    small = [f'model.{key}={str(value).replace(" ", "")}' for key, value in SMALL[task].items()]
    return cost.main(['--task', task, '--home', str(home), '--shape', '64', '96', '--batch', '2', '--steps', '1',
                      *extra, '--cfg-options', f'custom_hooks.0.teacher={teacher}', *small])


@pytest.fixture(scope='module')
def quickly():
    """What measures runs in forks, each thing once after one round: the numbers of tests are no measurements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, 'WARMUP', 1)
        patch.setattr(measuring, 'MOST', 1)
        patch.setattr(cost, 'subprocess', SimpleNamespace(run=forked))
        yield


def records(home):
    return json.loads((home / 'cost.json').read_text())['configs']


@pytest.fixture(scope='module')
def det(tmp_path_factory, quickly):
    """Three methods measured, and a config with a loss that does not exist; the first two share a distiller."""
    pytest.importorskip('mmdet')
    home = tmp_path_factory.mktemp('configs') / 'det'
    shipped(home, 'crosskd', 'fgd', 'icd', 'pkd', name=DET)
    broken = home / 'icd' / f'icd_{DET}'
    broken.write_text(broken.read_text().replace('ICDLoss', 'NoSuchLoss'))
    assert run(home) == 0
    return home


@pytest.fixture(scope='module')
def seg(tmp_path_factory, quickly):
    """A loss with learned tokens and one with an opponent."""
    pytest.importorskip('mmseg')
    home = tmp_path_factory.mktemp('configs') / 'seg'
    shipped(home, 'maskd', 'skd_holistic', name=SEG)
    assert run(home) == 0
    return home


def check_sound(record, shape):
    assert record['input_shape'] == shape and record['batch'] == 2 and record['device'] == 'CPU'
    assert record['processor'] and record['versions']['torch'].startswith(record['torch'])
    loss, plain = record['loss'], record['plain']
    times = [loss['forward_ms'], loss['backward_ms'], record['teacher']['ms'],
             *(plain[f'{part}_ms'] for part in ('forward', 'backward', 'optimizer'))]
    assert min(times) > 0
    assert min(loss['flops'], loss['own_bytes'], loss['opponent_ms']) >= 0
    assert min(plain['flops'], record['teacher']['flops'], plain['peak_bytes']) > 0
    assert loss['peak_bytes'] > loss['tapped_bytes'] > 0


def test_detection_group(det):
    found = records(det)
    crosskd, fgd = found[f'crosskd/crosskd_{DET}'], found[f'fgd/fgd_{DET}']
    for record in (crosskd, fgd):
        check_sound(record, [64, 96])
    # Measured in one process: the very same plain step.
    assert crosskd['plain'] == fgd['plain'] == found[f'pkd/pkd_{DET}']['plain']
    # The teacher runs as far as each needs it.
    assert fgd['teacher']['until'] == 'neck' and crosskd['teacher']['until'].startswith('bbox_head')
    assert crosskd['teacher']['flops'] > fgd['teacher']['flops']
    # The head's second pass: the last convolutions of both towers and both predictors, forward and to their input, for
    # 64x96 at strides 8 to 128.
    cells = 2 * (8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1 * 1)
    assert crosskd['loss']['flops'] == 2 * (2 * cells * 9 * 32 * (32 + 32 + 9 * 80 + 9 * 4))
    assert crosskd['loss']['own_bytes'] == 0 < fgd['loss']['own_bytes']
    assert crosskd['loss']['opponent_ms'] == 0 and 'terms' not in crosskd
    assert fgd['loss']['tapped_bytes'] == 2 * 32 * 8 * 12 * 4


def test_an_error_is_noted_and_stops_nothing(det):
    record = records(det)[f'icd/icd_{DET}']
    assert "unknown loss type 'NoSuchLoss'" in record['error'] and set(record) == {'error', 'hash'}
    assert 'not measured: ' in (det / 'icd' / 'README.md').read_text()


def test_segmentation_group(seg):
    found = records(seg)
    maskd, skd = found[f'maskd/maskd_{SEG}'], found[f'skd_holistic/skd_holistic_{SEG}']
    for record in (maskd, skd):
        check_sound(record, [64, 96])
    assert skd['loss']['opponent_ms'] > 0 and maskd['loss']['opponent_ms'] == 0
    assert set(skd['terms']) == {f'skd_holistic_1_{part}' for part in ('kd', 'pairwise', 'holistic')}
    assert set(maskd['terms']) == {'maskd_0_maskd', 'maskd_0_maskd_aux'}
    parts = skd['terms'].values()
    assert skd['loss']['flops'] == sum(part['flops'] for part in parts)
    assert skd['loss']['own_bytes'] == sum(part['own_bytes'] for part in parts)
    assert max(part['peak_bytes'] for part in parts) <= skd['loss']['peak_bytes'] <= sum(
        part['peak_bytes'] for part in parts)


def test_a_second_run_measures_nothing(det, monkeypatch):
    before = records(det)

    def never(*_, **__):
        raise AssertionError('measured again')

    monkeypatch.setattr(cost, 'run_group', never)
    assert run(det) == 0
    assert records(det) == before
    with pytest.raises(AssertionError, match='measured again'):
        run(det, '--retry')
    with pytest.raises(AssertionError, match='measured again'):  # other settings
        run(det, '--batch', '3')


def test_only_what_has_changed_is_measured(det, tmp_path, monkeypatch):
    home = tmp_path / 'det'
    shutil.copytree(det, home)
    asked = []
    monkeypatch.setattr(cost, 'run_group', lambda entries, *_: asked.extend(entry.name for entry in entries))
    path = home / 'fgd' / f'fgd_{DET}'
    path.write_text(path.read_text().replace('tau=0.5', 'tau=0.6'))
    run(home)
    assert asked == [f'fgd/fgd_{DET}']
    asked.clear()
    monkeypatch.setattr(cost.origins, 'loss_sources', lambda losses: ['other text'])
    run(home)
    assert asked == [f'{method}/{method}_{DET}' for method in ('crosskd', 'fgd', 'icd', 'pkd')]


def test_a_killed_group_is_noted(det, tmp_path, monkeypatch):
    home = tmp_path / 'det'
    home.mkdir()
    shutil.copytree(det / 'fgd', home / 'fgd')
    monkeypatch.setattr(cost.subprocess, 'run', lambda *_, **__: type('Done', (), dict(returncode=-9)))
    assert run(home) == 0
    assert records(home)[f'fgd/fgd_{DET}']['error'] == 'killed, most likely because memory ran out'


def test_an_interruption_keeps_what_was_measured(det, tmp_path, monkeypatch):
    home = tmp_path / 'det'
    for method in ('crosskd', 'fgd'):
        shutil.copytree(det / method, home / method)

    def interrupted(command, **_):
        job = json.loads(Path(command[-1]).read_text())
        Path(job['out']).write_text(json.dumps({job['configs'][0]: fake(1.0, 0)}))
        raise KeyboardInterrupt

    monkeypatch.setattr(cost.subprocess, 'run', interrupted)
    assert run(home) == 130
    assert list(records(home)) == [f'crosskd/crosskd_{DET}']
    asked = []
    monkeypatch.setattr(cost, 'run_group', lambda entries, *_: asked.extend(entry.name for entry in entries))
    monkeypatch.setattr(cost, 'render', lambda *_: None)
    run(home)
    assert asked == [f'fgd/fgd_{DET}']


@pytest.mark.parametrize('shape, steps, options', [
    ((800, 1344), 3, ''), ((800, 1333), 3, ''), ((480, 800), 3, ' (`--shape 480 800`)'),
    ((800, 1344), 1, ' (`--steps 1`)')])
def test_a_card_names_what_was_not_the_default(shape, steps, options):
    record = dict(input_shape=list(shape), steps=steps, batch=2, threads=2, device='CPU', torch='2',
                  plain=dict(peak_bytes=None))
    height, width = shape
    assert cost_cards.settings_line('det', record) == f'Inputs 2x3x{height}x{width}{options}, CPU, 2 threads, torch 2.'
    record['processor'] = 'Model 7'
    assert ', CPU (Model 7), 2 threads, ' in cost_cards.settings_line('det', record)
    assert 'Model 7' not in cost_cards.settings_line('det', dict(record, device='Card 1'))


def test_cards_have_the_block_once_and_rendering_again_changes_nothing(det):
    cards = [det / method / 'README.md' for method in ('crosskd', 'fgd', 'icd')]
    texts = [card.read_text() for card in cards]
    for text in texts:
        assert text.count('<!-- cost:') == text.count('<!-- end of cost -->') == text.count('## Cost\n') == 1
        assert text.count(cost_cards.HEADER) == 1
    fgd = records(det)[f'fgd/fgd_{DET}']
    spent, added, flops = cost_cards.shares(fgd)
    assert f'| `fgd_{DET}` | {spent:.1f} | ' in texts[1]
    assert f'| {added:.1%} | {flops:.1%} | {added - flops:+.1%} |' in texts[1]
    assert f' | {fgd["teacher"]["ms"]:.0f} / {fgd["teacher"]["fast_ms"]:.0f} | ' in texts[1]  # exact, and in training
    assert 'Inputs 2x3x64x96 (`--shape 64 96 --steps 1`), CPU (' in texts[1] and '--task det --only fgd`' in texts[1]
    assert run(det, '--render') == 0
    assert [card.read_text() for card in cards] == texts
    # CrossKD's card had such a section; the block went to its end, and nothing else changed.
    section = texts[0].split('## Cost\n')[1].split('\n## ')[0]
    assert section.startswith('\nNo trainable parts.') and section.rstrip().endswith('<!-- end of cost -->')
    for method, text in zip(('crosskd', 'fgd'), texts):
        shipped_card = cost_cards.MARKS.sub('', (ROOT / 'configs' / 'det' / method / 'README.md').read_text())
        assert set(shipped_card.splitlines()) <= set(text.splitlines())


def test_where_the_block_goes():
    assert cost_cards.placed('# A\n\n## Results\n\nNone.\n\n## Traps\n\n- x\n', 'B\n') == (
        '# A\n\n## Results\n\nNone.\n\n## Cost\n\nB\n\n## Traps\n\n- x\n')
    assert cost_cards.placed('# A\n\nText.\n', 'B\n') == '# A\n\nText.\n\n## Cost\n\nB\n'
    assert cost_cards.placed('# A\n\n## Cost\n\nLow.\n\n## Traps\n\n- x\n', 'B\n') == (
        '# A\n\n## Cost\n\nLow.\n\nB\n\n## Traps\n\n- x\n')


@pytest.mark.parametrize('task', ['det', 'seg'])
def test_cards_are_up_to_date(task):
    """What is shipped was rendered from what is shipped."""
    home = ROOT / 'configs' / task
    cards = list(cost_cards.rendered(task, home, cost.Book(home)))
    assert len(cards) > 20
    assert [card.parent.name for card, wanted in cards if card.read_text() != wanted] == []


def test_a_card_without_results_loses_its_block(det, tmp_path):
    home = tmp_path / 'configs' / 'det'
    shutil.copytree(det, home)
    before = {method: (home / method / 'README.md').read_text() for method in ('crosskd', 'fgd', 'pkd')}
    book = json.loads((home / 'cost.json').read_text())
    book['configs'] = {name: record for name, record in book['configs'].items() if name.startswith('pkd/')}
    (home / 'cost.json').write_text(json.dumps(book))
    assert cost.main(['--task', 'det', '--home', str(home), '--render']) == 0
    after = {method: (home / method / 'README.md').read_text() for method in before}
    assert after['pkd'] == before['pkd'] and '<!-- cost:' in after['pkd']
    for method in ('crosskd', 'fgd'):
        assert '<!-- cost:' not in after[method] and cost_cards.HEADER not in after[method]
    # CrossKD's card says something else there, FGD's does not; the other sections are as they were.
    assert '## Cost\n\nNo trainable parts.' in after['crosskd'] and '## Cost' not in after['fgd']
    for method in ('crosskd', 'fgd'):
        assert cost_cards.placed(after[method], cost_cards.block('det', method, {
            name.partition('/')[2]: record for name, record in records(det).items() if name.startswith(f'{method}/')
        })) == before[method]


def fake(loss_ms, loss_flops):
    return dict(loss=dict(forward_ms=loss_ms / 2, backward_ms=loss_ms / 4, opponent_ms=loss_ms / 4, flops=loss_flops),
                plain=dict(forward_ms=200.0, backward_ms=400.0, optimizer_ms=100.0, flops=500),
                teacher=dict(ms=300.0, flops=500), hash='')


def test_check_lists_the_worst_first(tmp_path, capsys):
    home = tmp_path / 'det'
    home.mkdir()
    found = {'a/x.py': fake(150.0, 100), 'b/x.py': fake(160.0, 50), 'c/x.py': fake(300.0, 0),
             'd/x.py': dict(error='no memory', hash='')}
    (home / 'cost.json').write_text(json.dumps(dict(configs=found)))
    assert cost.main(['--task', 'det', '--home', str(home), '--check']) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == ['det/c/x.py: 300.0 ms, added 30.0%, FLOP share 0.0%',
                     'det/b/x.py: 160.0 ms, added 16.0%, FLOP share 5.0%',
                     'det/d/x.py: not measured: no memory',
                     '[cost] 3 configs measured, 1 not; 2 add more than 10% to the step over their share of the FLOPs']


def entry(home, method, **options):
    return cost.Entry(home / method / f'{method}_{DET}', home, dict(options=options))


def test_what_makes_a_group(det):
    crosskd, fgd = entry(det, 'crosskd'), entry(det, 'fgd')
    # FGD inherits and clips, which is no other step.
    assert [[one.name for one in group] for group in cost.groups_of([crosskd, fgd])] == [[crosskd.name, fgd.name]]
    for key, value in {'custom_hooks.0.teacher': 'other', 'model.bbox_head.num_classes': 7,
                       'optim_wrapper.optimizer.type': 'AdamW', 'custom_hooks.0.task_loss_weight': 0.5}.items():
        other = entry(det, 'fgd', **{key: value})
        assert len(cost.groups_of([crosskd, other])) == 2, key
    names = [name for index, one in enumerate((crosskd, fgd)) for name in one.losses(index)]
    assert names == ['loss_crosskd_0_crosskd', 'loss_fgd_1_fgd']


class Together:
    """A bench whose distiller refuses to hold the losses of x and y at once."""

    def __init__(self):
        self.built = []

    def distil(self, arguments, trained):
        names = set(arguments['losses'])
        self.built.append(''.join(sorted(names)))
        if {'x', 'y'} <= names:
            raise ValueError('first line\nnot both')
        self.distiller = SimpleNamespace(active_terms=lambda: names - {'z'} if len(names) > 1 else names)

    def record(self):
        return 'features'


def alone(name):
    return SimpleNamespace(name=name, arguments=dict(inherit='neck'), losses=lambda index: {name: {}})


def measured_together(names, monkeypatch):
    def measure_config(bench, names, *_):
        if names == ['bad']:
            raise RuntimeError('too large')
        return dict(names=names)

    monkeypatch.setattr(cost, 'measure_config', measure_config)
    bench, found = Together(), {}
    cost.measure_together(bench, [alone(name) for name in names], {}, 1,
                          lambda entry, **record: found.update({entry.name: record}))
    return bench.built, found


def test_what_does_not_go_together_is_measured_apart(monkeypatch):
    built, found = measured_together(['a', 'x', 'b', 'y'], monkeypatch)
    assert built == ['abxy', 'ax', 'by'] and found == {name: dict(names=[name]) for name in 'axby'}
    # z has no weight at the step where the others have one.
    built, found = measured_together(['a', 'z'], monkeypatch)
    assert built == ['az', 'a', 'z'] and set(found) == {'a', 'z'}


def test_what_fails_at_full_size_stops_nothing(monkeypatch):
    built, found = measured_together(['a', 'bad', 'b'], monkeypatch)
    assert len(built) == 1
    assert found == {'a': dict(names=['a']), 'bad': dict(error='RuntimeError: too large'), 'b': dict(names=['b'])}


def test_images_are_of_the_size_that_a_loader_pads_to():
    """RTMDet joins maps of stride 32 with finer ones and pads nothing itself."""
    assert cost.padded((800, 1333)) == (800, 1344) and cost.padded((512, 1024)) == (512, 1024)


def test_no_paths_of_this_machine_in_an_error():
    assert cost.last_line(FileNotFoundError("no file '/some/folder/y.pth' here")) == (
        "FileNotFoundError: no file 'y.pth' here")
    assert cost.last_line('first\nRuntimeError: 3 m/s at http://a.b/c') == 'RuntimeError: 3 m/s at http://a.b/c'


# ---------------------------------------------------------------------------------------------------------------------
# the measurement of one term


@pytest.fixture(scope='module')
def bench():
    """CWD behind a 1x1 convolution on the five levels of a small neck, with 2 images of 64x64."""
    pytest.importorskip('mmdet')
    cfg = read_config(str(ROOT / 'configs/profile/retinanet_cwd.py'), {
        'model.backbone.base_channels': 8, 'model.backbone.stem_channels': 8, 'model.neck.in_channels': [8, 16, 32, 64],
        'custom_hooks.0.losses.loss_cwd.adapter': dict(type='ConvAdapter', always=True),
        'custom_hooks.0.losses.loss_mgd': dict(type='MGDLoss', at='neck')})
    arguments = hook_arguments(hook_entries(cfg)[0], Problems())
    with scope_of(cfg):
        bench = measuring.Bench(cfg, 2, (64, 64), 'cpu')
        bench.distil(arguments, trained=False)
        yield bench


def test_flops_and_bytes_of_an_adapter_by_hand(bench):
    found = bench.terms_cost(['loss_cwd'], bench.record(), 1)
    cells = 2 * (8 * 8 + 4 * 4 + 2 * 2 + 1 + 1)
    # Forward, gradient of the input, gradient of the weight: a multiplication and an addition each.
    assert found['flops'] == 3 * 2 * cells * 64 * 64
    assert found['own_bytes'] == 5 * (64 * 64 + 64) * 4
    assert found['tapped_bytes'] == 2 * 64 * 8 * 8 * 4
    # At least the adapted features, the gradient of the tapped ones and of the adapter.
    assert found['peak_bytes'] > 2 * cells * 64 * 4 + found['own_bytes']
    assert found['opponent_ms'] == 0 < found['forward_ms']


def test_the_step_of_an_opponent_counts(bench, monkeypatch):
    rates = []

    class Product:
        def learn(self, rate):
            rates.append(rate)
            return torch.ones(2, 3) @ torch.ones(3, 5)

    recording = bench.record()
    before = bench.terms_cost(['loss_cwd'], recording, 1)
    monkeypatch.setattr(bench.distiller.terms['loss_cwd'].loss, 'opponents', lambda: [Product()], raising=False)
    after = bench.terms_cost(['loss_cwd'], recording, 1)
    assert after['flops'] == before['flops'] + 2 * 2 * 3 * 5
    # A warm-up, the turns and the one for the memory; nothing moves.
    assert len(rates) >= 3 and set(rates) == {0.0} and after['opponent_ms'] > 0


def test_measuring_leaves_nothing_behind(bench):
    recording = bench.record()
    bench.terms_cost(['loss_cwd', 'loss_mgd'], recording, 1)
    assert all(parameter.grad is None for parameter in (*bench.student.parameters(), *bench.distiller.parameters()))
    assert all(tensor.grad is None and tensor.is_leaf for tensor in recording.records['student']['neck'])
    assert not bench.student._forward_hooks and not bench.distiller.current.records


def test_a_recording_is_what_the_term_is_given_in_training(bench):
    """Same value, and the same gradient on the neck, as in a step with the distiller."""
    bench.distiller.eval()  # no running statistics, so that both see the same
    try:
        recording = bench.record()
        given = recording.fresh(0)
        term = bench.distiller.terms['loss_cwd']
        step = bench.distiller.current
        comparison, = step.read([term], given.records, given.batch)
        value = step.evaluate(comparison).total
        value.backward()
        with step.open(bench.data['inputs'], bench.fresh()):
            bench.student(bench.data['inputs'], bench.fresh(), mode='loss')
            step.hear()
            in_training, = step.read([term])
            trained = step.evaluate(in_training).total
        gradients = torch.autograd.grad(trained, in_training.student)
        assert value.item() == pytest.approx(trained.item(), rel=1e-4)
        for tensor, gradient in zip(given.records['student']['neck'], gradients):
            assert torch.allclose(tensor.grad, gradient, rtol=1e-3, atol=1e-8)
    finally:
        bench.distiller.train()


def test_every_turn_is_another_step(bench):
    recording = bench.record()
    recording.records['teacher']['neck'].memo['seen'] = True
    later = recording.fresh(3)
    assert later.batch.info.step == recording.batch.info.step + 3
    assert later.records['teacher']['neck'].memo == {}
    first, second = recording.records['student']['neck'][0], later.records['student']['neck'][0]
    assert first is not second and first.data_ptr() == second.data_ptr() and second.requires_grad


def test_shared_tensors_stay_shared():
    tensor = torch.ones(2, requires_grad=True)
    record = Recorded((tensor * 2, ))
    record.calls = (Call((record[0], [tensor]), {'x': {'y': record[0]}}, None), )
    found = Recording({'student': {'a': record}}, KDBatch()).fresh(0)
    call = found.records['student']['a'].calls[0]
    assert call.args[0] is call.kwargs['x']['y'] is found.records['student']['a'][0] and call.args[0].is_leaf
    assert call.args[1][0] is not tensor


def test_the_batch_keeps_its_size_without_augmentation():
    pytest.importorskip('mmdet')
    cfg = Config.fromfile(str(ROOT / 'configs/profile/retinanet_cwd.py'))
    cfg.model.data_preprocessor.batch_augments = [dict(type='BatchFixedSizePad', size=(128, 128), img_pad_value=0)]
    with scope_of(cfg):
        sizes = [tuple(measuring.Bench(cfg, 1, (64, 64), 'cpu', augment=augment).data['inputs'].shape[-2:])
                 for augment in (True, False)]
    assert sizes == [(128, 128), (64, 64)]
