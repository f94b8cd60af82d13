"""The `compress` command. Each subcommand parses its arguments and calls one function.

Heavy packages are imported inside the commands: a misspelt recipe key is refused without loading torch.
"""

import contextlib
import errno
import math
import os
import sys
from pathlib import Path

import click

import compress as package
from compress import signals, streams, usage
from compress.errors import InputError, WorkError, first_line
from compress.escaping import printable, without_controls

# waiting threads sleep: where cores are shared, spinning ones take many times as long (set before torch is imported)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

MISSED, BAD_INPUT, FAILED, INTERRUPTED = 1, 2, 3, 130


class Commands(usage.Helpful):
    """Maps the two error classes, a full disk, Ctrl-C and signals to the contract's exit codes, each with one sentence."""

    def main(self, *arguments, **options):
        with signals.raised(), streams.steady():
            try:
                return super().main(*arguments, **options)
            finally:
                if lost := streams.what_was_lost():
                    _stop(f"standard output: {lost}", FAILED)

    def make_context(self, *arguments, **options):
        with _one_sentence():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context):
        try:
            with _one_sentence():
                return super().invoke(context)
        except InputError as error:
            _stop(error, BAD_INPUT)
        except WorkError as error:
            _stop(error, FAILED)
        except MemoryError:
            _stop("out of memory", FAILED)
        except OSError as error:
            code = BAD_INPUT if error.errno == errno.ENAMETOOLONG else FAILED  # only a user can have given such a name
            _stop(f"{error.filename or 'input/output'}: {error.strerror or error}", code)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except signals.Stopped as stopped:
            _stop(f"stopped by {stopped.name}{_how_to_go_on(context)}", stopped.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _stop(f"interrupted{_how_to_go_on(context)}", INTERRUPTED)
        except Exception as error:  # a defect of ours must not look like a missed limit, which is exit code 1
            if os.environ.get("COMPRESS_TRACEBACK"):
                raise
            where = f"{type(error).__name__}: {first_line(error)}"
            _stop(f"internal error, {where}; COMPRESS_TRACEBACK=1 shows where, please report it", FAILED)


@contextlib.contextmanager
def _one_sentence():
    """A usage error is bad input like any other: one sentence, not click's several lines."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "compress"
        _stop(f"{error.format_message().rstrip('.')}; see '{command} --help'", BAD_INPUT)


def _how_to_go_on(context: click.Context) -> str:
    return "; run again with --resume to continue" if context.invoked_subcommand == "apply" else ""


def _stop(message, code: int):
    click.echo(f"compress: {printable(message)}", err=True)
    sys.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package.__version__, "-V", "--version", prog_name="compress")
def main():
    """Compress hybrid SSM-Transformer-MoE language models, export them, and check what ships."""


@main.command()
@click.argument("recipe", shell_complete=usage.recipes)
@click.option(
    "-m",
    "--model",
    shell_complete=usage.files,
    help="Local folder or hub id (id@revision pins one); overrides the recipe's.",
)
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Output folder; default out/RECIPE_NAME.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe key, such as passes.0.quantize.weights=int8.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Validate and print the plan with predicted sizes; write nothing.")
def apply(recipe, model, out, overrides, device, seed, resume, overwrite, dry_run):
    """Run RECIPE (a path or a shipped name): passes, checkpoint, exports, check, report."""
    from compress.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    name = _model_name(loaded, model)
    _refuse_missing_device(device)
    from compress import pipeline, plan, progress
    from compress.report import terminal
    from compress.source import resolve

    source = resolve(name, loaded.folder if model is None else None, config_only=dry_run)
    job = pipeline.Job(loaded, source, out or Path("out") / loaded.name, device, seed, resume, overwrite)
    if dry_run:
        click.echo(plan.describe(pipeline.prepare(job, needs_weights=False), job.out))
        return
    with progress.logged():
        report = pipeline.apply(job)
    terminal.show(report, job.out)
    sys.exit(0 if report["verdict"] in terminal.GOOD else MISSED)


def _model_name(loaded, model: str | None) -> str:
    """What -m gives, else what the recipe names."""
    name = loaded.recipe.model if model is None else model
    if name is None:
        raise InputError(f"{loaded.path}: names no model; add 'model:' or pass -m")
    return name


def _refuse_missing_device(device: str) -> None:
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available to torch")


@main.command()
@click.argument("model", metavar="MODEL_OR_ARTIFACT", shell_complete=usage.files)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@click.option("--verify", is_flag=True, help="Read every file and compare its digest with the manifest's.")
def inspect(model, as_json, verify):
    """Layers, roles, parameters, bytes, experts and state sizes of a model folder, hub id or ONNX artifact."""
    from compress import inspection, strict_json

    facts = inspection.inspect(model, verify=verify)
    click.echo(strict_json.dumps(facts) if as_json else inspection.as_text(facts))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--to", "kind", default="onnx", show_default=True, help="The exporter.")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Output folder; default CHECKPOINT-KIND.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set an option of the exporter: layout=genai."
)
def export(checkpoint, kind, out, overrides):
    """Export one CHECKPOINT: its folder, or an output folder of apply."""
    from compress import exporting

    folder = exporting.export_checkpoint(checkpoint, kind, out, overrides)
    click.echo(printable(f"wrote {folder}"), err=True)


@main.command()
@click.argument("baseline", shell_complete=usage.files)
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--prompts", multiple=True, help="heldout, recall, self or a .txt/.jsonl file; may be repeated. Default: heldout."
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="METRIC=VALUE",
    help="A limit that decides the exit code; may be repeated.",
)
@click.option("--limits", "limits_file", type=click.Path(path_type=Path), help="YAML file of METRIC: VALUE.")
@click.option("--samples", type=int, default=48, show_default=True, help="Windows from each prompt set, at most.")
@click.option("--length", type=int, default=512, show_default=True, help="Tokens in a window.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--json", "json_file", metavar="FILE", help="Write the rows as JSON; - for stdout.")
def check(baseline, candidate, prompts, limits, limits_file, samples, length, seed, device, json_file):
    """Compare CANDIDATE (checkpoint folder or ONNX artifact) with the checkpoint BASELINE; exit 1 where a limit is missed."""
    from compress import results
    from compress.check import command
    from compress.report import terminal

    settings = command.settings(prompts, limits, limits_file, samples, length)
    results.refuse_unwritable(json_file)
    _refuse_missing_device(device)
    result = command.check(baseline, candidate, settings, seed=seed, device=device)
    results.put_json(result, json_file)
    sys.exit(0 if result["verdict"] in terminal.GOOD else MISSED)


@main.command()
@click.argument("recipe", shell_complete=usage.recipes)
@click.option(
    "-m",
    "--model",
    shell_complete=usage.files,
    help="Local folder or hub id (id@revision pins one); overrides the recipe's.",
)
@click.option(
    "--format", "formats", multiple=True, metavar="FORMAT", help="May be repeated. Default: those the recipe names."
)
@click.option(
    "--samples", type=click.IntRange(1, 1_000_000), help="Windows from each prompt set; default the recipe's."
)
@click.option("--length", type=click.IntRange(2, 1_048_576), help="Tokens in a window; default the recipe's.")
@click.option("--json", "json_file", metavar="FILE", help="Write the figures as JSON; - for stdout.")
@click.option("--html", "html_file", metavar="FILE", help="Write a heat map as one HTML file.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
def sensitivity(recipe, model, formats, samples, length, json_file, html_file, device, seed):
    """Measure what quantizing each layer's roles costs, alone and in every format that RECIPE names."""
    from compress.recipe import load_recipe

    loaded = load_recipe(recipe)
    name = _model_name(loaded, model)
    _refuse_missing_device(device)
    from compress import results
    from compress.sensitivity import cells, command, run
    from compress.source import resolve

    results.refuse_unwritable(json_file, html_file)
    tried = cells.candidates(run.quantize_options(loaded), formats)
    source = resolve(name, loaded.folder if model is None else None)
    result = run.run(run.Job(loaded, source, tried, samples, length, device, seed))
    command.write(result, loaded.name, json_file, html_file)


@main.command()
@click.argument("model", shell_complete=usage.files)
@click.option(
    "--prompts", multiple=True, help="prose, recall, self or a .txt/.jsonl file; may be repeated. Default: prose."
)
@click.option(
    "--samples",
    type=click.IntRange(1, 1_000_000),
    default=64,
    show_default=True,
    help="Windows from each prompt set, at most.",
)
@click.option("--length", type=click.IntRange(2, 1_048_576), default=512, show_default=True, help="Tokens in a window.")
@click.option("--json", "json_file", metavar="FILE", help="Write the figures as JSON; - for stdout.")
@click.option("--html", "html_file", metavar="FILE", help="Write plots and tables as one HTML file.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
def experts(model, prompts, samples, length, json_file, html_file, device, seed):
    """Survey the experts of MODEL (a folder or hub id): load, scores, likeness, and what pruning would lose."""
    from compress.calibration.settings import Calibration
    from compress.strict_model import from_flags

    settings = from_flags(Calibration, prompts=prompts or ("prose",), samples=samples, length=length)
    _refuse_missing_device(device)
    from compress import results
    from compress.experts import command, run
    from compress.source import resolve

    results.refuse_unwritable(json_file, html_file)
    command.write(run.run(run.Job(resolve(model), settings, device, seed)), json_file, html_file)


def _finite(context: click.Context, option: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter("expected a finite number", context, option)
    return value


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=click.IntRange(1), default=200, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    callback=_finite,
    default=0.0,
    show_default=True,
    help="0 takes the most likely token.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
def run(artifact, prompt, max_tokens, temperature, seed):
    """Stream text from a checkpoint or an ONNX artifact; PROMPT - reads standard input."""
    from compress import generation

    text = _read_stdin() if prompt == "-" else prompt or ""
    shown = without_controls if sys.stdout.isatty() else str
    for piece in generation.stream_text(artifact, text, max_tokens, temperature, seed):
        click.echo(shown(piece), nl=False)
        if streams.reader_is_gone():
            return
    click.echo()


def _read_stdin() -> str:
    if sys.stdin is None:
        raise InputError("the prompt is to come from standard input, which is closed")
    from compress.prompts.text import decode

    return decode(sys.stdin.buffer.read(), "the prompt on standard input")


@main.command()
@click.argument("name", required=False, shell_complete=usage.recipe_names)
def recipes(name):
    """List the shipped recipes with a line each; with NAME print it."""
    from compress import resources

    if name is None:
        for stem, path in resources.shipped_recipes().items():
            first_line = path.read_text(encoding="utf-8").split("\n", 1)[0]
            click.echo(f"{stem:<16} {first_line.lstrip('# ')}")
    else:
        click.echo(resources.shipped_recipe(name).read_text(encoding="utf-8"), nl=False)


@main.command()
@click.argument("name", required=False, shell_complete=usage.documents)
def docs(name):
    """List the README and the documents it links to; with NAME print one."""
    from compress import resources

    if name is not None:
        click.echo(resources.document(name).read_text(encoding="utf-8"), nl=False)
        return
    for stem, path in resources.documents().items():
        title = path.read_text(encoding="utf-8").split("\n", 1)[0]
        click.echo(f"{stem:<16} {title.lstrip('# ')}")
    click.echo(printable(f"in {resources.folder('docs').parent}"))


if __name__ == "__main__":
    main()
