"""The `compress` command. Each subcommand parses its arguments and calls one function.

Heavy packages are imported inside the commands: a misspelt recipe key is refused without loading torch.
"""

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

import compress as package
from compress.errors import InputError
from compress.recipe import completion
from compress.studies.check_options import Flags, check_options
from compress.terminal import streams
from compress.terminal.escaping import printable, without_controls
from compress.terminal.exits import Commands

if TYPE_CHECKING:
    from compress.recipe.recipe import LoadedRecipe

# waiting threads sleep: where cores are shared, spinning ones take many times as long (set before torch is imported)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

MODEL = click.option(
    "-m",
    "--model",
    shell_complete=completion.files,
    help="Local folder or hub id (id@revision pins one); overrides the recipe's.",
)
DEVICE = click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
SEED = click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package.__version__, "-V", "--version", prog_name="compress")
def main() -> None:
    """Compress hybrid SSM-Transformer-MoE language models, export them, and check what ships."""


@main.command()
@click.argument("recipe", shell_complete=completion.recipes)
@MODEL
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Output folder; default out/RECIPE_NAME.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe key, such as passes.0.quantize.weights=int8.",
)
@DEVICE
@SEED
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Validate and print the plan with predicted sizes; write nothing.")
def apply(recipe: str, model: str | None, out: Path | None, overrides: tuple[str, ...], device: str, seed: int, resume: bool,
          overwrite: bool, dry_run: bool) -> None:  # fmt: skip
    """Run RECIPE (a path or a shipped name): passes, checkpoint, exports, check, report."""
    from compress.recipe.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    name = _model_name(loaded, model)
    _refuse_missing_device(device)
    from compress.apply import pipeline, plan
    from compress.recipe.source import resolve
    from compress.report import step_summary, terminal
    from compress.terminal import progress

    source = resolve(name, loaded.folder if model is None else None, config_only=dry_run)
    job = pipeline.Job(loaded, source, out or Path("out") / loaded.name, device, seed, resume, overwrite)
    if dry_run:
        click.echo(plan.describe(pipeline.prepare(job, needs_weights=False), job.out))
        return
    with progress.logged():
        report = pipeline.apply(job)
    code = terminal.exit_code(report["verdict"], loaded.recipe.check.on_undecided if loaded.recipe.check else "fail")
    terminal.show(report, job.out, code)
    step_summary.append((job.out / "report.md").read_text(encoding="utf-8"))
    sys.exit(code)


def _model_name(loaded: "LoadedRecipe", model: str | None) -> str:
    """What -m gives, else what the recipe names."""
    name: str | None = loaded.recipe.model if model is None else model
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
@click.argument("model", metavar="MODEL_OR_ARTIFACT", shell_complete=completion.files)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@click.option("--verify", is_flag=True, help="Read every file and compare its digest with the manifest's.")
def inspect(model: str, as_json: bool, verify: bool) -> None:
    """Layers, roles, parameters, bytes, experts and state sizes of a model folder, hub id or ONNX artifact."""
    from compress.strict import json_text
    from compress.studies import inspection

    facts = inspection.inspect(model, verify=verify)
    click.echo(json_text.dumps(facts) if as_json else inspection.as_text(facts))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--to", "kind", default="onnx", show_default=True, help="The exporter.")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Output folder; default CHECKPOINT-KIND.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set an option of the exporter: layout=genai."
)
def export(checkpoint: Path, kind: str, out: Path | None, overrides: tuple[str, ...]) -> None:
    """Export one CHECKPOINT: its folder, or an output folder of apply; exit 1 where an engine was built with layers widened."""
    from compress.apply import exporting
    from compress.report import terminal

    written = exporting.export_and_describe(checkpoint, kind, out, overrides)
    click.echo(printable(f"wrote {written.folder}"), err=True)
    if written.exported.build is not None:
        sys.exit(terminal.show_build(written.exported.build))


@main.command()
@click.argument("baseline", shell_complete=completion.files)
@click.argument("candidate", type=click.Path(path_type=Path))
@check_options
@SEED
@DEVICE
@click.option("--json", "json_file", metavar="FILE", help="Write the rows as JSON; - for stdout.")
@click.option("--html", "html_file", metavar="FILE", help="Write the report as one HTML file.")
@click.option("--junit", "junit_file", metavar="FILE", help="Write limits and audits as tests that CI systems list.")
def check(
    baseline: str, candidate: Path, seed: int, device: str, json_file: str | None, html_file: str | None,
    junit_file: str | None, **flags: Unpack[Flags],
) -> None:  # fmt: skip
    """Compare CANDIDATE (checkpoint folder or ONNX artifact) with BASELINE, the original or an older artifact; exit 1 where a limit
    is missed or undecided."""
    from compress.report import terminal
    from compress.studies import comparison, told
    from compress.studies.across import Across
    from compress.studies.originals import Originals

    settings, originals, beside = comparison.settings(flags), Originals(flags), Across(flags)
    targets = told.Targets(json_file, html_file, junit_file)
    told.refuse_unwritable(targets)
    _refuse_missing_device(device)
    result = comparison.compare(comparison.Job(baseline, candidate, settings, originals, beside, seed, device))
    told.write(result, targets, settings.on_undecided, worse_fails=flags["fail_if_worse"])
    sys.exit(terminal.exit_code(result["verdict"], settings.on_undecided))


@main.command()
@click.argument("recipe", shell_complete=completion.recipes)
@MODEL
@click.option(
    "--format", "formats", multiple=True, metavar="FORMAT", help="May be repeated. Default: those the recipe names."
)
@click.option(
    "--samples", type=click.IntRange(1, 1_000_000), help="Windows from each prompt set; default the recipe's."
)
@click.option("--length", type=click.IntRange(2, 1_048_576), help="Tokens in a window; default the recipe's.")
@click.option("--json", "json_file", metavar="FILE", help="Write the figures as JSON; - for stdout.")
@click.option("--html", "html_file", metavar="FILE", help="Write a heat map as one HTML file.")
@DEVICE
@SEED
def sensitivity(recipe: str, model: str | None, formats: tuple[str, ...], samples: int | None, length: int | None,
                json_file: str | None, html_file: str | None, device: str, seed: int) -> None:  # fmt: skip
    """Measure what quantizing each layer's roles costs, alone and in every format that RECIPE names."""
    from compress.recipe.recipe import load_recipe

    loaded = load_recipe(recipe)
    name = _model_name(loaded, model)
    _refuse_missing_device(device)
    from compress.recipe.source import resolve
    from compress.studies import results
    from compress.studies.sensitivity import cells, command, study

    results.refuse_unwritable(json_file, html_file)
    tried = cells.candidates(study.quantize_options(loaded), formats)
    source = resolve(name, loaded.folder if model is None else None)
    result = study.study(study.Job(loaded, source, tried, samples, length, device, seed))
    command.write(result, loaded.name, json_file, html_file)


@main.command()
@click.argument("model", shell_complete=completion.files)
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
@DEVICE
@SEED
def experts(model: str, prompts: tuple[str, ...], samples: int, length: int, json_file: str | None, html_file: str | None,
            device: str, seed: int) -> None:  # fmt: skip
    """Survey the experts of MODEL (a folder or hub id): load, scores, likeness, and what pruning would lose."""
    from compress.recipe.calibration import Calibration
    from compress.strict.models import from_flags

    settings = from_flags(Calibration, prompts=prompts or ("prose",), samples=samples, length=length)
    _refuse_missing_device(device)
    from compress.recipe.source import resolve
    from compress.studies import results
    from compress.studies.experts import command, survey

    results.refuse_unwritable(json_file, html_file)
    command.write(survey.survey(survey.Job(resolve(model), settings, device, seed)), json_file, html_file)


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
@SEED
def run(artifact: Path, prompt: str | None, max_tokens: int, temperature: float, seed: int) -> None:
    """Stream text from a checkpoint or an ONNX artifact; PROMPT - reads standard input."""
    from compress.studies import generation

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
@click.argument("name", required=False, shell_complete=completion.recipe_names)
def recipes(name: str | None) -> None:
    """List the shipped recipes with a line each; with NAME print it."""
    from compress.recipe import resources

    if name is None:
        for stem, path in resources.shipped_recipes().items():
            first_line = path.read_text(encoding="utf-8").split("\n", 1)[0]
            click.echo(f"{stem:<16} {first_line.lstrip('# ')}")
    else:
        click.echo(resources.shipped_recipe(name).read_text(encoding="utf-8"), nl=False)


@main.command()
@click.argument("name", required=False, shell_complete=completion.documents)
def docs(name: str | None) -> None:
    """List the README and the documents it links to; with NAME print one."""
    from compress.recipe import resources

    if name is not None:
        click.echo(resources.document(name).read_text(encoding="utf-8"), nl=False)
        return
    for stem, path in resources.documents().items():
        title = path.read_text(encoding="utf-8").split("\n", 1)[0]
        click.echo(f"{stem:<16} {title.lstrip('# ')}")
    click.echo(printable(f"in {resources.folder('docs').parent}"))


if __name__ == "__main__":
    main()
