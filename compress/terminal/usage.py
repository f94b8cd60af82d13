"""What `compress -h` says beyond the options."""

from collections.abc import Sequence

import click

EXIT_CODES = (
    ("0", "done, and every limit held, or none was set"),
    ("1", "done, and a limit was missed or is undecided; artifacts and report are kept"),
    ("2", "the input is wrong: usage, recipe, model folder, data; one sentence says what"),
    ("3", "the work itself failed, such as a full disk, or a defect of ours"),
    ("130, 143, 129", "interrupted by Ctrl-C, SIGTERM or SIGHUP; 'apply --resume' continues"),
)
ENVIRONMENT = (
    ("COMPRESS_CACHE", "folder for results kept between runs; default ~/.cache/compress"),
    ("COMPRESS_TRACEBACK", "set to 1, an internal error shows where it happened"),
)
EXAMPLES = (
    ("compress apply tiny-int8", "a shipped recipe on the shipped model, into out/tiny-int8"),
    ("compress apply tiny-int8 -m MODEL --dry-run", "the plan and the sizes for a model of yours"),
    ("compress check MODEL out/tiny-int8", "what was written, compared with the original"),
)


class Helpful(click.Group):
    """A group whose help has every command's whole summary, examples, exit codes and environment variables."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        commands = ((name, self.commands[name]) for name in self.list_commands(context))
        _section(formatter, "Commands", [(name, command.get_short_help_str(limit=1000)) for name, command in commands])

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        _section(formatter, "Examples", EXAMPLES)
        _section(formatter, "Exit codes", EXIT_CODES)
        _section(formatter, "Environment", ENVIRONMENT)


def _section(formatter: click.HelpFormatter, title: str, rows: Sequence[tuple[str, str]]) -> None:
    with formatter.section(title):
        formatter.write_dl(rows, col_max=len(max((first for first, _ in rows), key=len)))
