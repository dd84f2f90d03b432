"""tools/measure.py: the numbers belong together, and the file does not hide the standard library's ``profile``."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd_mm.lab import cost as benchmark
from kd_mm.lab.commands import profile
from kd_mm.lab.configs import hook_arguments, hook_entries, read_config
from kd_mm.lab.meters import count_flops
from kd_mm.lab.models import scope_of
from kd_mm.ops.problems import Problems

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location('kd_mm_tool_measure', ROOT / 'tools' / 'measure.py')
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)

SMALL = ['model.bbox_head.num_classes=2', 'model.bbox_head.stacked_convs=1',
         'model.backbone.base_channels=8', 'model.backbone.stem_channels=8', 'model.neck.in_channels=[8,16,32,64]']


def test_the_numbers_are_positive_and_consistent(tmp_path, capsys):
    out = tmp_path / 'cost.json'
    assert TOOL.main([str(ROOT / 'configs/profile/retinanet_cwd.py'), '--shape', '64', '96', '--batch', '1', '--steps',
                      '2', '--json', str(out), '--cfg-options', *SMALL]) == 0
    result = json.loads(out.read_text())
    parts = {name: result[f'{name}_ms'] for name in (
        'plain_step', 'needed_teacher', 'fast_teacher', 'full_teacher', 'kd_step')}
    assert all(value > 0 for value in parts.values())
    assert all(0 < result['fastest_ms'][name] <= value for name, value in parts.items())
    base = parts['plain_step'] + parts['needed_teacher']
    assert result['ratio'] == pytest.approx(parts['kd_step'] / base)
    assert result['overhead_ms'] == pytest.approx(parts['kd_step'] - base)
    assert result['ratio_of_rounds']['low'] <= result['ratio_of_rounds']['median'] <= result['ratio_of_rounds']['high']
    assert [len(values) for values in result['rounds_ms'].values()] == [2, 2, 2, 2, 2]
    assert result['input_shape'] == [64, 96] and result['batch'] == 1 and result['steps'] == 2
    memory = result['peak_memory']
    assert 0 < memory['plain_bytes'] < memory['kd_bytes']
    assert [term['name'] for term in result['terms']] == ['loss_cwd']
    term = result['terms'][0]
    assert term['forward_ms'] > 0 and term['backward_ms'] > 0
    # CWD has no adapter here: at least the gradient of all five levels.
    assert term['peak_bytes'] > 256 * (8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1) * 4 / 4 and term['flops'] == 0
    assert result['teacher_ratio'] == pytest.approx(parts['fast_teacher'] / parts['needed_teacher'])
    assert result['teacher_form'].startswith('norms folded')
    text = capsys.readouterr().out
    assert 'fast teacher' in text and 'norms folded' in text
    assert f'{term["peak_bytes"] / 2**20:.1f}' in text
    assert f'{result["ratio"]:.3f}' in text and 'loss_cwd' in text and 'MiB' in text
    rows = [line[:16].strip() for line in text.splitlines()]
    assert rows.index('by rounds') == rows.index('ratio') + 1  # which it is about
    for ratio, told in ((1.2, True), (0.9, False)):
        profile.print_result(dict(result, teacher_ratio=ratio))
        assert ("try speed='exact'" in capsys.readouterr().out) == told


@pytest.fixture(scope='module')
def bench():
    options = {name: ast.literal_eval(value) for name, value in (option.split('=') for option in SMALL)}
    cfg = read_config(str(ROOT / 'configs/profile/retinanet_cwd.py'), options)
    arguments = hook_arguments(hook_entries(cfg)[0], Problems())
    with scope_of(cfg):
        bench = benchmark.Bench(cfg, 1, (64, 64), 'cpu')
        bench.distil(arguments)
        bench.times(1)
    return bench


def test_the_fast_teacher_is_that_of_the_training(bench):
    """In its own form, no further than the last tap, and without a trace."""
    calls, folded = [], []
    head = bench.teacher.model.bbox_head.register_forward_pre_hook(lambda *_: calls.append(1))
    pair = bench.teacher.fast.folding.pairs[0]
    factors = pair.factors
    pair.factors = lambda: folded.append(1) or factors()
    bench.fast_teacher(bench.fresh())
    bench.needed_teacher(bench.fresh())
    head.remove()
    del pair.factors
    assert not calls and folded == [1]
    cost = bench.teacher_cost(1)
    assert cost['ms'] > 0 and cost['fast_ms'] > 0 and cost['form'].startswith('norms folded')


def test_the_needed_teacher_stops_at_the_last_tap(bench):
    calls = []
    handles = [module.register_forward_hook(lambda *_, name=name: calls.append(name))
               for name, module in bench.teacher.model.named_modules()
               if name in ('backbone.layer4', 'neck.fpn_convs.4.conv', 'bbox_head.retina_cls')]
    assert bench.last_path == 'neck' and bench.last_calls == 1
    bench.needed_teacher(bench.fresh())
    assert calls == ['backbone.layer4', 'neck.fpn_convs.4.conv']
    bench.full_teacher(bench.fresh())
    assert 'bbox_head.retina_cls' in calls
    for handle in handles:
        handle.remove()
    assert not any('forward' in vars(module) for module in bench.teacher.model.modules())


def test_the_distiller_is_attached_for_the_kd_step_only(bench):
    assert not bench.student._forward_hooks
    runs = bench.teacher.runs
    bench.step(bench.fresh())
    assert bench.teacher.runs == runs
    bench.distiller.attach()
    bench.step(bench.fresh())
    bench.distiller.detach()
    assert bench.teacher.runs == runs + 1


def test_a_config_without_hook_is_refused(capsys):
    assert TOOL.main(['mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', '--steps', '1']) == 1
    assert 'must have one kd_mm.DistillHook' in capsys.readouterr().err


def test_a_config_without_the_hook_says_what_to_do(tmp_path, capsys):
    (tmp_path / 'plain.py').write_text(f"_base_ = {str(ROOT / 'configs/profile/retinanet_cwd_teacher.py')!r}\n")
    assert TOOL.main([str(tmp_path / 'plain.py')]) == 1
    assert "and has 0: add dict(type='kd_mm.DistillHook'" in capsys.readouterr().err


def test_a_peer_is_refused(tmp_path, capsys):
    """It is no forward that could be cut at the last tap, but a training step."""
    config = tmp_path / 'peer.py'
    config.write_text(f'''
_base_ = {str(ROOT / "configs/profile/retinanet_cwd.py")!r}
peer = dict(type='PeerTeacher', config=dict(model=_base_.model))
custom_hooks = [dict(type='kd_mm.DistillHook', teacher=peer, losses=dict(loss_x=dict(type='PKDLoss', at='neck')))]
''')
    assert TOOL.main([str(config), '--shape', '64', '96', '--steps', '1', '--cfg-options', *SMALL]) == 1
    assert 'the cost is measured for a fixed teacher; a peer (PeerTeacher)' in capsys.readouterr().err


def test_scripts_in_tools_get_the_profile_module_of_the_standard_library():
    """torch imports cProfile, which imports ``profile``: with tools/ first on the path that is our file."""
    code = 'import sys; sys.path.insert(0, "tools"); import cProfile, profile; print(profile.__file__, profile.Profile)'
    found = subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert str(ROOT) not in found.split()[0] and found.split()[0].endswith('profile.py')


def test_attention_counts_on_a_cpu_too():
    """The same products whether a kernel fuses them or not; fused, the first one is made again on the way back."""
    from torch.nn.functional import scaled_dot_product_attention
    rows = torch.randn(1, 1, 16, 8, requires_grad=True)
    product = 2 * 16 * 16 * 8
    assert count_flops(lambda: scaled_dot_product_attention(rows, rows, rows)) == 2 * product
    assert count_flops(lambda: scaled_dot_product_attention(rows, rows, rows).sum().backward()) == 7 * product
