"""A wheel, an sdist and an editable installation have the configs, the tools and the index of openmim.

Built from a copy of the checkout, installed into folders, and used from another folder in processes of their own, in
which nothing but the installation has a kd_mm.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from pairs import detection_pair

from kd_mm.hosts.shipped import folder, inherit, live, merged
from kd_mm.hosts.versions import index_name, ranges

ROOT = Path(__file__).resolve().parents[1]
BUILD = 'import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))'
#: One config of each kind: a base of mmdet, of mmseg, hooks of the base, a list of bases, a chain of ours, a base in
#: another folder, no base.
KINDS = ('det/fgd/fgd_retinanet_r50_from_r101_2x_coco', 'seg/cwd/cwd_pspnet_r18_from_r101_80k_cityscapes',
         'det/cwd/cwd_rtmdet_s_from_m_300e_coco', 'demo/seg_distilled', 'profile/retinanet_wide',
         'benchmark/gfl_teacher', 'benchmark/det')
COMPARE = '''
import json, sys
from pathlib import Path
from mmengine.config import Config
from mmengine.utils import get_installed_path

home, checkout, kinds, live = Path(get_installed_path("kd_mm")) / "configs", *json.loads(sys.argv[1])

def content(path):
    text = json.dumps(Config.fromfile(str(path)).to_dict(), sort_keys=True, default=str)
    return text if live else text.replace(str(home), checkout)

for kind in kinds:
    wanted = content(f"{checkout}/{kind}.py")
    Path("lazy.py").write_text("from mmengine.config import read_base\\nwith read_base():\\n    from kd_mm.configs."
                               f"{kind.replace('/', '.')} import *\\n")
    Path("text.py").write_text(f"_base_ = {str(home / kind) + '.py'!r}\\n")
    for path in (home / f"{kind}.py", "lazy.py", "text.py"):
        assert content(path) == wanted, (kind, path)
Path("child.py").write_text("from mmengine.config import read_base\\nwith read_base():\\n    from kd_mm.configs."
                            f"{kinds[0].replace('/', '.')} import *\\noptim_wrapper.update(clip_grad=None)\\n")
child = Config.fromfile("child.py")
assert child.optim_wrapper.clip_grad is None and child.optim_wrapper.optimizer.type == "SGD"
import kd_mm
print(kd_mm.__file__)
'''


def run(place, *command, path=(), code=None):
    """A process that sees the packages of this environment and, before them, those of the folders in ``path``."""
    if code is None:
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, path)), OMP_NUM_THREADS='1')
        command = [sys.executable, '-W', 'ignore', *command]
    else:  # without the .pth files of the environment, which may have an editable kd_mm
        environment = dict(os.environ, PYTHONPATH='', OMP_NUM_THREADS='1')
        site = [str(Path(pytest.__file__).resolve().parents[1])]
        start = f'import site, sys; [site.addsitedir(p) for p in {list(map(str, path))!r}]; sys.path += {site!r}\n'
        command = [sys.executable, '-S', '-W', 'ignore', '-c', start + code, *command]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    checkout = tmp_path_factory.mktemp('source') / 'kd_mm'
    for name in ('kd_mm', 'configs', 'tools', 'examples'):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns('__pycache__'))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith('.'):
            shutil.copy(path, checkout)
    return checkout


def build(source, kind, out):
    out.mkdir(exist_ok=True)
    return out / run(source, '-c', BUILD, f'build_{kind}', str(out)).splitlines()[-1]


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    return build(source, 'wheel', tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp('site')
    run(target, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target', str(target), str(wheel))
    return target


def test_openmim_finds_each_config_once(installed):
    """It looks through the whole package for a file of the name, and refuses two."""
    package = installed / 'kd_mm'
    shipped = [path.relative_to(ROOT / 'configs') for path in (ROOT / 'configs').rglob('*.py')]
    assert all((package / 'configs' / path).is_file() for path in shipped)
    count = Counter(name for _, _, files in os.walk(package, followlinks=True) for name in files)
    assert not {path.name: count[path.name] for path in shipped if count[path.name] != 1}
    index = yaml.safe_load((package / '.mim' / 'model-index.yml').read_text())
    models = [model for path in index['Import'] for model in
              yaml.safe_load((package / '.mim' / path).read_text())['Models']]
    assert {model['Config'] for model in models} == {
        path.relative_to(ROOT).as_posix() for task in ('det', 'seg') for path in ROOT.glob(f'configs/{task}/*/*.py')}
    assert all((package / model['Config']).is_file() for model in models)
    assert (package / '.mim' / 'tools' / 'train.py').is_file() and (package / 'py.typed').is_file()


def test_what_is_no_code_is_there_too(installed):
    """Templates and tables that a module reads."""
    files = [path.relative_to(ROOT) for path in (ROOT / 'kd_mm').rglob('*') if path.is_file()
             and path.suffix not in ('.py', '.pyc')]
    assert len(files) > 3 and not [path for path in files if not (installed / path).is_file()]


def test_the_metafiles_are_those_of_the_configs():
    subprocess.run([sys.executable, str(ROOT / 'tools' / 'dev' / 'metafiles.py'), '--check'], check=True)


def test_the_command_from_another_folder(installed, tmp_path):
    command = str(installed / 'bin' / 'kd-mm')
    assert 'From a big model to a better small one' in run(tmp_path, command, '--help', path=[installed])
    assert 'dense detector: 2 of' in run(tmp_path, command, 'methods', 'FGD', path=[installed])  # our tables are there
    pytest.importorskip('mmdet')
    report = run(tmp_path, command, 'check', 'kd_mm::retinanet_cwd', '--shape', '64', '64', path=[installed])
    assert 'loss_cwd' in report and not list(tmp_path.iterdir())


def test_distill_in_an_environment_with_a_host(wheel, tmp_path, coco_root):
    """A new virtual environment in which pip has installed the wheel; the hosts are those of this one, without the
    .pth files that would show an editable kd_mm."""
    pytest.importorskip('mmdet')
    home, work = tmp_path / 'venv', tmp_path / 'elsewhere'
    work.mkdir()
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(home)], check=True)
    python = home / 'bin' / 'python'
    place = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([str(python), '-c', place], check=True, capture_output=True, text=True).stdout.strip())
    subprocess.run([sys.executable, '-m', 'pip', '--python', str(python), 'install', '--quiet', '--no-deps',
                    '--no-index', str(wheel)], check=True)
    assert subprocess.run([str(python), '-c', 'import torch'], capture_output=True).returncode  # it is empty
    (site / 'hosts.pth').write_text(f'{Path(pytest.__file__).resolve().parents[1]}\n')
    pair = detection_pair(work, coco_root, steps=2)
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': '', 'PYTHONWARNINGS': 'ignore'}
    done = subprocess.run([str(home / 'bin' / 'kd-mm'), 'distill', pair.student, '--teacher', pair.teacher,
                           '--teacher-ckpt', pair.weights, '--work-dir', 'run', '--no-cost'], cwd=work, env=environment,
                          capture_output=True, text=True)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-3000:]
    assert (work / 'run' / 'student.pth').is_file()
    assert '| student, distilled |' in (work / 'run' / 'report.md').read_text()
    where = subprocess.run([str(python), '-W', 'ignore', '-c', 'import kd_mm; print(kd_mm.__file__)'], cwd=work,
                           env=environment, capture_output=True, text=True).stdout.strip()
    assert where.startswith(str(site))


def test_both_styles_inherit_from_an_installed_config(installed, tmp_path):
    pytest.importorskip('mmdet'), pytest.importorskip('mmseg')
    kinds = json.dumps([str(ROOT / 'configs'), KINDS, False])
    where = run(tmp_path, kinds, path=[installed], code=COMPARE)
    assert where.strip().startswith(str(installed))


def test_an_editable_installation(source, tmp_path):
    pytest.importorskip('mmdet')
    site = tmp_path / 'site'
    zipfile.ZipFile(build(source, 'editable', tmp_path / 'out')).extractall(site)
    kinds = json.dumps([str(source / 'configs'), [KINDS[0], KINDS[4]], True])
    assert run(tmp_path, kinds, path=[site], code=COMPARE).strip().startswith(str(source))
    # The configs are those of the checkout, as they are now; nothing was written into its package.
    changed = source / 'configs' / f'{KINDS[0]}.py'
    changed.write_text(changed.read_text().replace('tau=0.5', 'tau=0.25'))
    assert run(tmp_path, json.dumps([str(source / 'configs'), KINDS[:1], True]), path=[site], code=COMPARE)
    assert not (source / 'kd_mm' / 'configs').exists() and not (source / 'kd_mm' / '.mim').exists()
    # What others read in the metadata is still there.
    assert (next(site.glob('*.dist-info')) / 'top_level.txt').read_text().split()[-1] == 'kd_mm'


def test_a_wheel_from_the_sdist_is_the_same(source, wheel, tmp_path):
    archive = build(source, 'sdist', tmp_path / 'sdist')
    with tarfile.open(archive) as content:
        content.extractall(tmp_path / 'unpacked', **(dict(filter='data') if hasattr(tarfile, 'data_filter') else {}))
    again = build(next((tmp_path / 'unpacked').iterdir()), 'wheel', tmp_path / 'wheel')
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_a_base_by_a_function_merges_as_a_base(tmp_path):
    (tmp_path / 'base.py').write_text("model = dict(a=dict(x=1, y=2), b=dict(z=3))\nsteps = [1, 2]\n")
    own = "model = dict(a=dict(y=5), b=dict(_delete_=True, w=1))\nsteps = [3]\nname = 'mine'\n"
    (tmp_path / 'child.py').write_text("_base_ = './base.py'\n" + own)
    variables = {'__file__': 'x', 'LazyObject': None}
    exec(own, variables)
    assert merged(variables, inherit([str(tmp_path / 'base.py')], 'det')) == live(str(tmp_path / 'child.py'))
    assert Path(folder('det')).name == 'det'


def test_the_extras_name_the_versions_that_are_checked():
    text = (ROOT / 'setup.py').read_text()
    for name, (least, below) in ranges().items():
        assert f"'{index_name(name)}>={least}{f',<{below}' if below else ''}'" in text
