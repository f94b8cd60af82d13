"""How a command ends: the contract's exit codes, each failure with one sentence on stderr."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from compress.errors import InputError, WorkError, first_line, is_out_of_memory
from compress.terminal import signals, streams, usage
from compress.terminal.escaping import printable

MISSED, BAD_INPUT, FAILED, INTERRUPTED = 1, 2, 3, 130


class Commands(usage.Helpful):
    """Maps the two error classes, a full disk, Ctrl-C and signals to the contract's exit codes, each with one sentence."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        with signals.raised(), streams.steady():
            try:
                return super().main(*arguments, **options)
            finally:
                if lost := streams.what_was_lost():
                    stop(f"standard output: {lost}", FAILED)

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _one_sentence():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> object:
        try:
            with _one_sentence():
                return super().invoke(context)
        except InputError as error:
            stop(error, BAD_INPUT)
        except WorkError as error:
            stop(error, FAILED)
        except OSError as error:
            code = BAD_INPUT if error.errno == errno.ENAMETOOLONG else FAILED  # only a user can have given such a name
            stop(f"{error.filename or 'input/output'}: {error.strerror or error}", code)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except signals.Stopped as stopped:
            stop(f"stopped by {stopped.name}{_how_to_go_on(context)}", stopped.exit_code)
        except (KeyboardInterrupt, click.Abort):
            stop(f"interrupted{_how_to_go_on(context)}", INTERRUPTED)
        except Exception as error:  # a defect of ours must not look like a missed limit, which is exit code 1
            if os.environ.get("COMPRESS_TRACEBACK"):
                raise
            if is_out_of_memory(error):
                stop("out of memory", FAILED)
            what = f"{type(error).__name__}: {first_line(error)}"
            where = " ".join(getattr(error, "__notes__", [])[:1])  # a plugin's hook, where it is in one
            stop(
                f"internal error{where and ' '}{where}, {what}; COMPRESS_TRACEBACK=1 shows where, please report it",
                FAILED,
            )


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """A usage error is bad input like any other: one sentence, not click's several lines."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "compress"
        stop(f"{error.format_message().rstrip('.')}; see '{command} --help'", BAD_INPUT)


def _how_to_go_on(context: click.Context) -> str:
    return "; run again with --resume to continue" if context.invoked_subcommand == "apply" else ""


def stop(message: object, code: int) -> NoReturn:
    click.echo(f"compress: {printable(message)}", err=True)
    sys.exit(code)
