"""Settings of the site: Sphinx reads the repository itself, so that cards and pages are included and never copied."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import kd_mm  # noqa: E402
from tools.dev import docs_links, docs_pages  # noqa: E402

project = 'kd_mm'
version = release = kd_mm.__version__
copyright = 'the authors of kd_mm, Apache License 2.0'
language = 'en'

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx_copybutton']
root_doc = 'docs/index'
include_patterns = ['docs/**', 'configs/**', '*.md']
exclude_patterns = ['docs/_build', '.venv*', 'work_dirs', 'docs/conf.py']

myst_heading_anchors = 4
myst_enable_extensions = ['colon_fence', 'deflist']

add_module_names = False
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_inherit_docstrings = False
napoleon_google_docstring, napoleon_numpy_docstring, napoleon_use_ivar = True, False, True
napoleon_custom_sections = [('Class attributes', 'params_style')]
# References to our own names must lead somewhere; those to torch, mmengine and the hosts are not looked up, and
# attributes that a class lists in its docstring have no place of their own.
nitpicky = True
nitpick_ignore_regex = [(r'py:.*', r'(?!kd_mm\.).*'), (r'py:attr', r'.*')]

highlight_language = 'text'  # of blocks that name none: formulas, output
html_theme = 'furo'
html_title = f'kd_mm {release}'
html_static_path, html_css_files = ['_static'], ['site.css']
html_show_sourcelink = False
html_copy_source = False
copybutton_prompt_text = r'>>> |\.\.\. '
copybutton_prompt_is_regexp = True
pygments_style, pygments_dark_style = 'friendly', 'monokai'


def setup(app):
    docs_pages.setup(app)
    docs_links.setup(app)
