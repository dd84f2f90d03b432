"""Files that are not what a command takes are told in a sentence, by every command."""

import cv2
import numpy as np
import pytest
import torch
from pairs import kd_mm, message
from stock import detector

from kd_mm.lab.curves import check_file

#: Command -> its words with a config in it.
COMMANDS = dict(
    init=lambda config: ('init', config, '--teacher', config), check=lambda config: ('check', config),
    taps=lambda config: ('taps', config), profile=lambda config: ('profile', config),
    train=lambda config: ('train', config), test=lambda config: ('test', config, 'weights.pth'),
    split=lambda config: ('split', config, 'a', 'b', '--out', 'steps'),
    distill=lambda config: ('distill', config, '--teacher', config),
    report=lambda config: ('report', '--student', config, __file__),
    pretrain=lambda config: ('pretrain', config, '--teacher', config, '--images', '.', '--batch', 1))
CONTENTS = dict(open='model = dict(', undefined='model = nothing', text='[1, 2',
                module="custom_imports = dict(imports=['gone_and_lost'])")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite('picture.png', np.zeros((8, 8, 3), np.uint8))
    return tmp_path


def refused(*words):
    result = kd_mm(*words)
    assert result.exit_code == 1 and (result.exception is None or isinstance(result.exception, SystemExit)), message(
        result)
    return message(result) + (result.stderr if result.stderr_bytes else '')


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('content', CONTENTS)
def test_a_file_that_is_no_config(here, command, content):
    file = here / ('file.txt' if content == 'text' else f'{content}.py')
    file.write_text(CONTENTS[content])
    text = refused(*COMMANDS[command](file))
    assert file.name in text, text
    said = 'gone_and_lost' if content == 'module' else 'is no config that mmengine can read'
    assert said in text, text


def test_a_config_of_an_export_that_is_none(here):
    (here / 'open.py').write_text('model = dict(')
    torch.save(dict(state_dict={'a': torch.zeros(1)}), here / 'weights.pth')
    assert '--config' in refused('export', 'weights.pth', 'out.pth', '--config', 'open.py')


@pytest.mark.parametrize('command', ['check', 'taps', 'profile', 'train'])
def test_an_option_without_a_value(here, command):
    (here / 'a.py').write_text('model = dict(type="mmdet.RetinaNet")')
    result = kd_mm(command, 'a.py', '--cfg-options', 'model.neck', '=', 'None')
    assert result.exit_code == 2 and "'model.neck' is no KEY=VALUE" in message(result) + result.output
    result = kd_mm(command, 'a.py', '--cfg-options', '=3')
    assert result.exit_code == 2 and "'=3' is no KEY=VALUE" in message(result)


def test_what_no_training_can_go_on_from(here):
    (here / 'a.py').write_text("""default_scope = 'mmseg'
model = dict(type='EncoderDecoder')
train_dataloader = train_cfg = optim_wrapper = dict(a=1)
""")
    (here / 'text.pth').write_text('no weights')
    torch.save(dict(state_dict={'a': torch.zeros(1)}), here / 'plain.pth')
    assert 'text.pth cannot be loaded as a checkpoint' in refused('train', 'a.py', '--resume', 'text.pth')
    text = refused('train', 'a.py', '--resume', 'plain.pth')
    assert 'plain.pth holds state_dict, not the state of a training' in text and 'load_from=plain.pth' in text


def test_places_that_cannot_be_written(here):
    (here / 'file').write_text('')
    for name, said in (('no/curves.png', 'cannot be written to'), ('curves', 'the ending says the format'),
                       ('', 'the ending says the format')):
        assert said in refused('check', 'a.py', '--plot', name)  # before anything is read
    result = kd_mm('report', '--student', 'a.py', 'a.pth', '--out', 'file')
    assert result.exit_code == 1 and '--out file is a file. Give a folder' in message(result)
    check_file(str(here / 'curves.jpg'))  # whatever matplotlib writes
    assert 'cannot be written' in refused('profile', 'a.py', '--json', here)
    assert 'cannot be written' in refused('profile', 'a.py', '--json', 'no/such/file.json')


@pytest.mark.parametrize('command', ['check', 'profile', 'report'])
@pytest.mark.parametrize('device', ['nothing', 'cuda:99'])
def test_a_device_that_is_not_there(here, command, device):
    assert f'--device {device} cannot be used here' in refused(command, 'a.py', '--device', device)


@pytest.mark.parametrize('words', [('--batch', 0), ('--data', -1)])
def test_numbers_that_mean_nothing(here, words):
    result = kd_mm('check', 'a.py', *words)
    assert result.exit_code == 2 and '--batch must be at least 1, and --data at least 0' in message(result)


def test_a_package_that_a_part_imports_when_it_is_built(coco_root, tmp_path, monkeypatch):
    """The Runner meets it; the message says what to install, and another ImportError stays what it is."""
    (tmp_path / 'with_package.py').write_text('''
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class NeedsPackage(Hook):
    def __init__(self, name):
        __import__(name)
''')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cfg = detector(coco_root, tmp_path / 'work')
    cfg.custom_imports = dict(imports=['with_package'], allow_failed_imports=False)
    for name in ('no_such_package', 'os.no_such_part'):
        cfg.custom_hooks = [dict(type='NeedsPackage', name=name)]
        cfg.dump(f'config_{name.split(".")[0]}.py')
    assert 'it needs the package no_such_package, which is not installed: pip install no_such_package' in refused(
        'train', 'config_no_such_package.py', '--work-dir', tmp_path / 'run')
    assert isinstance(kd_mm('train', 'config_os.py', '--work-dir', tmp_path / 'other').exception,
                      ModuleNotFoundError)
