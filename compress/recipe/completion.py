"""What a shell completes: recipes, documents, files."""

import click
from click.shell_completion import CompletionItem

from compress.recipe import resources


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """For arguments that are a path or something else."""
    return [CompletionItem(incomplete, type="file")]


def recipes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of shipped recipes, and files."""
    return [*files(context, parameter, incomplete), *recipe_names(context, parameter, incomplete)]


def documents(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in resources.documents() if name.startswith(incomplete)]


def recipe_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in resources.shipped_recipes() if name.startswith(incomplete)]
