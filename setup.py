import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"^__version__ = '(.*)'", (ROOT / 'kd_mm' / '__init__.py').read_text(), re.MULTILINE).group(1)

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
    package_data={'kd_mm': ['py.typed', 'hosts/renamed.json']},
    install_requires=['torch>=2.1', 'numpy', 'scipy', 'click>=8.1', 'rich>=13'],
    entry_points={'console_scripts': ['kd-mm=kd_mm.lab.commands.app:run']},
    extras_require={
        'det': ['mmengine>=0.10', 'mmcv>=2.0', 'mmdet>=3.0'],
        'seg': ['mmengine>=0.10', 'mmcv>=2.0', 'mmsegmentation>=1.0', 'ftfy', 'regex'],
        'foundation': ['timm>=1.0.9', 'safetensors', 'transformers>=4.45'],
        'dev': ['pytest', 'pytest-cov', 'ruff', 'mypy'],
    },
)
