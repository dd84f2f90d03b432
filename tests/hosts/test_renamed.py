"""Every config has a name of its own, and whoever asks for an old one is told the new one."""

from collections import Counter
from pathlib import Path

import pytest

from kd_mm.hosts.models import load_config
from kd_mm.hosts.renamed import renamed
from kd_mm.hosts.zoo import zoo_config
from kd_mm.lab.commands import train
from kd_mm.lab.configs import read_config

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
OLD = 'det/fgd/retinanet-r50_from_retinanet-r101_2x_coco.py'
NEW = 'It has a new name: configs/det/fgd/fgd_retinanet_r50_from_r101_2x_coco.py'


def test_names_are_unique_and_identifiers():
    names = [path.name for path in CONFIGS.rglob('*.py')]
    assert len(names) > 100 and not [name for name, count in Counter(names).items() if count > 1]
    assert all(path.with_suffix('').name.isidentifier() for path in CONFIGS.rglob('*.py'))
    for path in CONFIGS.glob('[ds]e[tg]/*/*.py'):
        assert path.name.startswith(f'{path.parent.name}_'), path


def test_the_table_leads_from_what_is_gone_to_what_is_there():
    assert len(renamed()) == 110 and OLD in renamed()
    assert all((CONFIGS / new).is_file() for new in renamed().values())
    assert not [old for old in renamed() if (CONFIGS / old).exists()]


@pytest.mark.parametrize('path', [f'configs/{OLD}', str(CONFIGS / OLD)])
def test_an_old_path_names_the_new_one(path):
    with pytest.raises(FileNotFoundError, match=NEW):
        read_config(path)
    with pytest.raises(SystemExit, match=NEW):
        train.main([path])
    with pytest.raises(FileNotFoundError, match=NEW):
        load_config(path)


def test_ours_by_name():
    assert zoo_config('kd_mm::fgd_retinanet_r50_from_r101_2x_coco') == CONFIGS / NEW.rsplit('configs/', 1)[1]
    assert zoo_config('kd_mm::profile/pspnet_cwd.py') == CONFIGS / 'profile' / 'pspnet_cwd.py'
    with pytest.raises(FileNotFoundError, match=NEW):
        zoo_config(f'kd_mm::{OLD}')
    with pytest.raises(FileNotFoundError, match=r'kd_mm has no such config\. Closest: .*fgd'):
        zoo_config('kd_mm::fgd_retinanet_r50')
    with pytest.raises(SystemExit, match='kd_mm has no such config'):
        train.main(['kd_mm::nowhere'])


def test_from_inside_its_folder_and_by_its_name_alone(tmp_path, monkeypatch):
    folder, name = OLD.rsplit('/', 1)
    (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / folder)
    with pytest.raises(FileNotFoundError, match=NEW):
        read_config(name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='28 had this one: .*pkd_retinanet_r50_from_r101_2x'):
        read_config(name)
    with pytest.raises(FileNotFoundError, match=r'no such config: mine.py \(looked at [^)]*\)$'):
        read_config('mine.py')


def test_as_a_base(tmp_path):
    child = tmp_path / 'child.py'
    child.write_text(f'_base_ = {str(CONFIGS / OLD)!r}')
    with pytest.raises(FileNotFoundError, match=f'child.py: .*{NEW}'):
        read_config(str(child))
    with pytest.raises(SystemExit, match=f'child.py: .*{NEW}'):
        train.main([str(child)])
