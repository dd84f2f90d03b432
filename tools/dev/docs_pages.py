"""The pages of the site that are made from the code and from the files under ``configs/``: never written by hand.

``docs/conf.py`` calls :func:`setup`; everything goes to ``docs/generated``, which git ignores.  No host is imported.
"""

import contextlib
import html
import importlib
import io
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / 'docs' / 'generated'
TASKS = {'det': 'detection', 'seg': 'segmentation'}
#: Modules without a page: forwarders of earlier versions, and what `python -m` runs.
FORWARDERS = ('kd_mm.__main__', 'kd_mm.hooks', 'kd_mm.distiller')
#: Rooms whose modules share one page; each loss has a page of its own.
LOSSES = 'kd_mm.losses'


def row(*cells: Any) -> str:
    return '| ' + ' | '.join(str(cell) for cell in cells) + ' |'


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    return '\n'.join([row(*head), '|' + '---|' * len(head), *rows]) + '\n'


def cards() -> Iterator[Tuple[str, str, Path]]:
    """(det or seg, method, its card) of every method."""
    for task in TASKS:
        for card in sorted((ROOT / 'configs' / task).glob('*/README.md')):
            yield task, card.parent.name, card


def card_link(task: str, method: str, up: str = '..') -> str:
    """A link to a card, from a page that lies ``up`` below the root."""
    return f'[{task}/{method}]({up}/configs/{task}/{method}/README.md)'


def first_config(name: str) -> str:
    """Path of the first config of a folder such as ``det/fgd``, or of the one that is named, without ``.py``.

    Raises:
        ValueError: there is none.
    """
    path = ROOT / 'configs' / f'{name}.py'
    found = [path] if path.is_file() else sorted((ROOT / 'configs' / name).glob('*.py'))
    if not found:
        raise ValueError(f'configs/{name} has no config')
    return found[0].relative_to(ROOT).as_posix()


def train_command(text: str) -> str:
    """The command that trains a config: its name for :func:`first_config`, and options behind it.

    Raises:
        ValueError: there is no such config.

    Example:
        >>> train_command('det/golsd --resume')
        'kd-mm train configs/det/golsd/golsd_gfl_r50_from_r101_1x_coco.py --resume'
    """
    name, *options = text.split()
    return ' '.join(['kd-mm train', first_config(name), *options])


def survey_commands(text: str) -> List[str]:
    """Every command of ``docs/survey.md``, as it stands on the page."""
    return [train_command(found) if role else found
            for role, found in re.findall(r'(\{train\})?`([^`]+)`', text) if role or found.startswith('kd-mm ')]


# ---------------------------------------------------------------------------------------------------------------------
# what the code lists


def methods_page() -> str:
    """Every loss by what it compares: method, needs, place in our tables, cards."""
    from kd_mm.lab.commands import methods
    from kd_mm.losses.base.loss import KDLoss
    from kd_mm.registry import MODELS, choices
    ranks = methods.ranks()
    found: Dict[str, List[str]] = {kind: [] for kind in methods.KINDS}
    for name in choices(KDLoss):
        cls = MODELS.module_dict[name]
        module = cls.__module__.rsplit('.', 1)[1]
        title = ' '.join((cls.__doc__ or '').strip().split('\n\n')[0].split()).rstrip('.')
        places = [re.sub(', (.*) times the plain step', r' (\1x)', f'{pair}: {text}')
                  for pair, text in ranks.get(module, {}).items()]
        links = [card_link(task, module, '../..') for task in TASKS
                 if (ROOT / 'configs' / task / module / 'README.md').is_file()]
        found[methods.compares(cls)].append(row(
            f'[`{name}`](api/{cls.__module__}.rst)<br>{title}', ', '.join(methods.needs(cls)) or '-',
            '<br>'.join(places) or '-', '<br>'.join(links)))
    head = ('loss', 'needs', 'our rank (cost)', 'card')
    parts = [f'## {kind.capitalize()}\n\n{table(head, rows)}' for kind, rows in found.items() if rows]
    return ('# Every method\n\nMade from the registered losses, as `kd-mm methods` is. *Our rank* is that of the '
            'tables for [detection](../../configs/det/README.md) and [segmentation](../../configs/seg/README.md): '
            'tiny students, small sets, two seeds; its *cost* is a distilled step over a plain one there.\n\n'
            + '\n'.join(parts))


def report_rules() -> str:
    """Table of the rules of ``kd-mm report``, to be included."""
    from kd_mm.lab.report.advice import BOTH, RULES
    return table(['rule', 'what it has seen', 'what it suggests'], [
        row(f'`{rule.name}`' + ('' if rule.task == BOTH else f' ({rule.task})'), rule.when, rule.suggest)
        for rule in RULES])


def recipes_page() -> str:
    """Table of the registered recipes, to be included."""
    from kd_mm.lab.recipes import ORDER, recipes
    rows = [row(f'`{recipe.name}`', recipe.task, recipe.what, recipe.why,
                '<br>'.join(f'{kind}: {recipe.measured(kind)}' for kind in recipe.evidence) or '-')
            for recipe in recipes()]
    order = [f'- {kind}: {", ".join(f"`{name}`" for name in names)}' for kind, names in ORDER.items()]
    return (table(('recipe', 'task', 'what it compares', 'when', 'measured by us'), rows)
            + '\n`auto` tries, in this order:\n\n' + '\n'.join(order) + '\n')


def help_of(name: str) -> str:
    """What ``kd-mm NAME --help`` prints."""
    from click.testing import CliRunner

    from kd_mm.lab.commands.app import OWN, cli
    if name in OWN:
        return CliRunner().invoke(cli, [name, '--help'], prog_name='kd-mm').output
    argv, out = sys.argv, io.StringIO()
    sys.argv = [f'kd-mm {name}']
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            importlib.import_module(f'kd_mm.lab.commands.{name}').main(['--help'])
    finally:
        sys.argv = argv
    return out.getvalue()


def commands_page() -> str:
    """Every sub-command with its help."""
    from kd_mm.lab.commands.app import FORWARDED, OWN
    every = {**OWN, **FORWARDED}
    rows = [row(f'[`kd-mm {name}`](#kd-mm-{name})', text) for name, text in every.items()]
    parts = [f'## `kd-mm {name}`\n\n```text\n{help_of(name).strip()}\n```\n' for name in every]
    return ('# Every command\n\nAs `kd-mm --help` and `kd-mm SUB-COMMAND --help` print them.\n\n'
            + table(('command', 'what it does'), rows) + '\n' + '\n'.join(parts))


# ---------------------------------------------------------------------------------------------------------------------
# what stands in the cards and in the results


def cards_page() -> str:
    """Every card, by task."""
    from kd_mm.losses.base.loss import KDLoss
    from kd_mm.registry import MODELS, choices
    losses: Dict[str, List[str]] = {}
    for name in choices(KDLoss):
        losses.setdefault(MODELS.module_dict[name].__module__.rsplit('.', 1)[1], []).append(name)
    parts = []
    for task, title in TASKS.items():
        rows = []
        for _, method, card in (found for found in cards() if found[0] == task):
            heading = card.read_text(encoding='utf-8').split('\n', 1)[0].lstrip('# ')
            names = ', '.join(f'[`{name}`](api/{LOSSES}.{method}.rst)' for name in losses.get(method, ()))
            configs = len(list(card.parent.glob('*.py')))
            rows.append(row(f'[{heading}](../../configs/{task}/{method}/README.md)', names, configs))
        parts.append(f'## {title.capitalize()}\n\n{table(("card", "loss", "configs"), rows)}')
    return ('# The cards\n\nA card says what a method computes, which configs there are and where their numbers come '
            'from, what its authors published, what it costs here, and what goes wrong.\n\n' + '\n'.join(parts))


def our_scores() -> Dict[str, Dict[str, str]]:
    """Method -> pair of models -> what we measured, beside the plain student."""
    from kd_mm.lab.commands.methods import PAIRS
    found: Dict[str, Dict[str, str]] = {}
    for file in sorted((ROOT / 'configs').glob('*/benchmark.json')):
        for pair, content in json.loads(file.read_text(encoding='utf-8'))['pairs'].items():
            scores = {name: [run['score'] for run in runs.values()] for name, runs in content['runs'].items() if runs}
            if 'plain' not in scores:
                continue
            plain = statistics.fmean(scores['plain'])
            for name, values in scores.items():
                if name not in ('plain', 'teacher'):
                    mean = statistics.fmean(values)
                    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
                    found.setdefault(name, {})[PAIRS.get(pair, pair)] = (
                        f'{mean:.1f}{spread}, plain student {plain:.1f} ({len(values)} seeds)')
    return found


def section(text: str, title: str) -> Optional[str]:
    """What stands under a heading of the second level."""
    found = re.search(rf'^## {re.escape(title)}\n(.*?)(?=^## |\Z)', text, re.MULTILINE | re.DOTALL)
    return found.group(1).strip() if found else None


def published_page(task: str) -> str:
    """What the cards of a task say of published results, with our own numbers beside them."""
    ours, parts = our_scores(), []
    for _, method, card in (found for found in cards() if found[0] == task):
        text = card.read_text(encoding='utf-8')
        results = section(text, 'Results')
        if results is None:
            continue
        # Links of the card are relative to its folder.
        results = re.sub(r'\]\((?!https?:|#)', f'](../../configs/{task}/{method}/', results)
        measured = [f'- {pair}: {score}' for pair, score in ours.get(method, {}).items()
                    if ('segmenter' in pair) == (task == 'seg')]
        title = text.split('\n', 1)[0].lstrip('# ')
        parts.append(f'## {title}\n\n{results}\n\nMeasured by us (small models, small sets):\n\n'
                     + ('\n'.join(measured) or '- nothing')
                     + f'\n\n[The card](../../configs/{task}/{method}/README.md)\n')
    metric = 'COCO mAP on BCCD' if task == 'det' else 'mIoU on CamVid'
    return (f'# Published and measured: {TASKS[task]}\n\nThe text under each method is the *Results* section of its '
            'card, as it stands there: numbers of the authors or of the repository that the card names, on the full '
            f'data sets. Below it is what [our own table](../../configs/{task}/README.md) has: {metric}, mean and '
            'sample standard deviation. The two are not comparable with each other: other data, other models, other '
            'schedules.\n\n'
            + '\n'.join(parts))


def unsorted_losses() -> str:
    """The losses that no row of ``docs/survey.md`` names, as a line for its end."""
    from kd_mm.losses.base.loss import KDLoss
    from kd_mm.registry import choices
    text = (ROOT / 'docs' / 'survey.md').read_text(encoding='utf-8')
    rest = [name for name in choices(KDLoss) if f'`{name}`' not in text]
    return (', '.join(f'`{name}`' for name in rest) if rest else 'Every loss of this package stands above.') + '\n'


# ---------------------------------------------------------------------------------------------------------------------
# modules and the notebook


def modules() -> List[str]:
    """Names of all modules of the package that have a page."""
    found = []
    for path in sorted((ROOT / 'kd_mm').rglob('*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
        if name not in FORWARDERS:
            found.append(name)
    return found


def page_of(module: str) -> str:
    """The page that a module stands on: its own for a loss, that of its room for others."""
    parts = module.split('.')
    if module.startswith(f'{LOSSES}.') and parts[2] != 'base':
        return module
    return '.'.join(parts[:2]) if not module.startswith(f'{LOSSES}.base') else f'{LOSSES}.base'


def api_pages() -> Dict[str, str]:
    """File name -> content of the reference."""
    pages: Dict[str, List[str]] = {}
    for module in modules():
        pages.setdefault(page_of(module), []).append(module)
    result, lines = {}, []
    for page, members in pages.items():
        text = f'{page}\n{"=" * len(page)}\n'
        for module in members:
            heading = '' if module == page else f'\n{module}\n{"-" * len(module)}\n'
            text += f'{heading}\n.. automodule:: {module}\n' + ''.join(
                f'   :{option}:\n' for option in ('members', 'show-inheritance', 'ignore-module-all'))
        result[f'api/{page}.rst'] = text
        summary = (importlib.import_module(page).__doc__ or '').strip().split('\n\n')[0]
        lines.append((page, ' '.join(summary.split())))
    own = [entry for entry in lines if not entry[0].startswith(f'{LOSSES}.') or entry[0] == f'{LOSSES}.base']
    losses = [entry for entry in lines if entry not in own]
    index = ['# API reference', '', 'From the docstrings. Marks such as `[P]` and `[C]` say where a default comes '
             f'from: [{LOSSES}]({LOSSES}.rst). A page of a room holds all its modules; each method has its own.']
    for title, entries in (('Rooms', own), ('Methods', losses)):
        index += ['', f'## {title}', '', '| module | what it is |', '|---|---|']
        index += [f'| [{page}]({page}.rst) | {as_markdown(text)} |' for page, text in entries]
    result['api/index.md'] = '\n'.join(index) + '\n'
    return result


def as_markdown(text: str) -> str:
    """A sentence of a docstring without its marks of reStructuredText."""
    text = re.sub(r':\w+:`~?([^`]*)`', r'`\1`', text)
    return text.replace('``', '`').replace('|', '\\|')


def notebook_page(file: Path) -> str:
    """A notebook as a page: its words and its code, with the text that it printed."""
    parts = []
    for cell in json.loads(file.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(re.sub(r'\]\((?!https?:|#)', '](../', source))  # its links are relative to its own folder
        else:
            parts.append(f'```python\n{source}\n```')
            for output in cell.get('outputs', ()):
                text = ''.join(output.get('text', ()))
                if text:
                    parts.append(f'```text\n{text.rstrip()}\n```')
    name = file.relative_to(ROOT).as_posix()
    parts.insert(1, f'The notebook is [{name}](../../{name}); a test runs it.')
    return '\n\n'.join(parts) + '\n'


# ---------------------------------------------------------------------------------------------------------------------
# Sphinx


def pages() -> Dict[str, str]:
    """File name below ``docs/generated`` -> content."""
    return {
        'methods.md': methods_page(), 'recipes.inc': recipes_page(), 'report_rules.inc': report_rules(),
        'unsorted.inc': unsorted_losses(),
        'commands.md': commands_page(), 'cards.md': cards_page(), 'published_det.md': published_page('det'),
        'published_seg.md': published_page('seg'), **api_pages(),
        **{f'{file.stem}.md': notebook_page(file) for file in sorted((ROOT / 'docs').glob('*.ipynb'))}}


def generate(*_: Any) -> None:
    """Write what has changed, and remove what is no longer made."""
    wanted = {GENERATED / name: text for name, text in pages().items()}
    for path in [path for path in GENERATED.rglob('*') if path.is_file() and path not in wanted]:
        path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding='utf-8') != text:
            path.write_text(text, encoding='utf-8')


def spread_reductions(app: Any, what: str, name: str, obj: Any, options: Any, lines: List[str]) -> None:
    """What looks like a type to napoleon and is none: ``Reduction: ...``, ``Parts: ...``, a constant's sentence.

    The text of a sub-command's module is what its ``--help`` prints, and is shown as it is.
    """
    if what == 'module' and name.startswith('kd_mm.lab.commands.'):
        lines[:] = ['::', '', *(f'    {line}' for line in lines)]
        return
    if what in ('data', 'attribute') and lines:
        lines[0] = lines[0].replace(': ', ' – ')
        return
    found: List[str] = []
    for line in lines:
        marked = re.match(r'( +)(Reduction|Parts): (.*)', line)
        if marked and found and found[-1].strip() == 'Returns:':
            found += [f'{marked.group(1)}A scalar.']
        found += [line] if marked is None else ['', f'{marked.group(1)}**{marked.group(2)}:** {marked.group(3)}', '']
    lines[:] = found


def setup(app: Any) -> None:
    """Connect to Sphinx: the pages, and the role ``train`` that names the first config of a folder.

    The text of ``{train}`det/fgd` `` is the command that trains it, so that no path is written by hand; options may
    follow the folder, or the config in it.
    """
    from docutils import nodes

    def train(name: str, rawtext: str, text: str, lineno: int, inliner: Any, *_: Any) -> Any:
        try:
            command = re.sub(r'([/_])', r'\1<wbr>', html.escape(train_command(text)))
            literal = f'<code class="docutils literal notranslate">{command}</code>'
            return [nodes.raw(rawtext, literal, format='html')], []
        except ValueError as error:
            message = inliner.reporter.error(str(error), line=lineno)
            return [inliner.problematic(rawtext, rawtext, message)], [message]

    def unlisted(app: Any, env: Any) -> None:
        # Cards and modules are listed in tables and stay out of the menu; docs_links looks that all can be reached.
        for name in env.found_docs:
            if name.startswith('docs/generated/api/') or name.count('/') == 3 and name.startswith('configs/'):
                env.metadata[name].setdefault('orphan', True)

    app.connect('autodoc-process-docstring', spread_reductions, priority=400)  # before napoleon reads it
    app.add_role('train', train)
    app.connect('env-updated', unlisted)
    app.connect('builder-inited', generate)
