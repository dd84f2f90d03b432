"""``kd-mm recipes``: what there is to choose from."""

from typing import Optional

import click

from kd_mm.lab.recipes import recipes


@click.command('recipes')
@click.option('--task', type=click.Choice(['detection', 'segmentation']), help='Only those of one task.')
def command(task: Optional[str]) -> None:
    """List the recipes: small sets of losses with taps, adapters and weights.

    The numbers are of our own tables: tiny models on small sets, from scratch. They say that a recipe works.
    """
    for recipe in recipes(task):
        click.secho(f'{recipe.name} ({recipe.task})', bold=True)
        for what, text in (('compares', recipe.what), ('when', recipe.why), *(
                ('measured', f'{kind}: {recipe.measured(kind)}') for kind in recipe.evidence)):
            click.echo(click.wrap_text(text, 110, f'  {what:<10}', ' ' * 12))
