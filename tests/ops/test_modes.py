"""What passes find around them, and leave."""

import pytest
import torch

from kd_mm.ops.modes import autocast_dtype


@pytest.mark.filterwarnings('ignore:torch.*autocast.*deprecated')
@pytest.mark.parametrize('old', [False, True], ids=['torch', 'torch before 2.4'])
def test_the_mixed_precision_around(monkeypatch, old):
    def found(kind):
        with monkeypatch.context() as patch:  # for the question alone: autocast itself needs it today
            if old:
                patch.delattr(torch, 'get_autocast_dtype', raising=False)
            return autocast_dtype(kind)

    assert found('cpu') is None and found('cuda') is None
    with torch.autocast('cpu', torch.bfloat16):
        assert found('cpu') == torch.bfloat16 and found('cuda') is None
        with torch.autocast('cpu', enabled=False):
            assert found('cpu') is None
