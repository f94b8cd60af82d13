"""The options of `compress check`, as the command line has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypedDict, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., object])
PATH = click.Path(path_type=Path)


class Flags(TypedDict):
    """What the options below give, under the names of their parameters."""

    prompts: tuple[str, ...]
    limits: tuple[str, ...]
    limits_from: str | None
    samples: int
    length: int
    prefill: int
    distances: tuple[int, ...]
    trials: int | None
    audit: bool
    states: bool | None
    generate: int | None
    tokens: int | None
    tasks: tuple[str, ...]
    on_undecided: Literal["fail", "pass"]
    save_baseline: Path | None
    baseline_file: Path | None
    save_result: Path | None
    against_result: Path | None
    fail_if_worse: bool


TEXT = (
    click.option(
        "--prompts",
        multiple=True,
        help="heldout, recall, self or a .txt/.jsonl file; may be repeated. Default: heldout.",
    ),
    click.option("--samples", type=int, default=48, show_default=True, help="Windows from each prompt set, at most."),
    click.option("--length", type=int, default=512, show_default=True, help="Tokens in a window."),
    click.option(
        "--prefill", type=int, default=0, show_default=True, help="Tokens read in one call before decoding begins."
    ),
    click.option(
        "--distance",
        "distances",
        type=int,
        multiple=True,
        help="Tokens between facts and questions of recall; may be repeated.",
    ),
    click.option("--trials", type=int, help="Recall questions at each --distance, at least; default 400."),
)
LIMITS = (
    click.option(
        "--limit",
        "limits",
        multiple=True,
        metavar="METRIC=VALUE",
        help="A limit that decides the exit code; may be repeated.",
    ),
    click.option(
        "--limits",
        "limits_from",
        type=click.Path(),
        help="YAML file of METRIC: VALUE, or default: what the formats are expected to cost.",
    ),
    click.option(
        "--on-undecided",
        type=click.Choice(["fail", "pass"]),
        default="fail",
        show_default=True,
        help="Whether exit code is 1 or 0 where an interval reaches over its limit, and none is missed.",
    ),
)
MEASURED = (
    click.option(
        "--audit/--no-audit",
        default=True,
        show_default=True,
        help="Hold every stored tensor and every layer against BASELINE's.",
    ),
    click.option(
        "--states/--no-states",
        default=None,
        help="Measure states while decoding; default where CANDIDATE keeps them in formats of their own.",
    ),
    click.option("--generate", type=int, metavar="N", help="Compare what both go on with from N prompts, too."),
    click.option("--tokens", type=int, help="Of each text of --generate, at most; default 64."),
    click.option(
        "--tasks",
        multiple=True,
        metavar="FILE",
        help="A .jsonl file of questions with choices, or of texts to complete; may be repeated.",
    ),
)


ACROSS = (
    click.option(
        "--save-baseline",
        type=PATH,
        metavar="FILE",
        help="Keep what was measured of BASELINE, to check elsewhere without its weights.",
    ),
    click.option(
        "--baseline",
        "baseline_file",
        type=PATH,
        metavar="FILE",
        help="Take it from there; of BASELINE config.json and the tokenizer are enough then.",
    ),
    click.option(
        "--save-result", type=PATH, metavar="FILE", help="Keep what was measured for a later --against-result."
    ),
    click.option(
        "--against-result",
        type=PATH,
        metavar="FILE",
        help="Say what is better or worse than in a kept result on the same prompts.",
    ),
    click.option(
        "--fail-if-worse",
        is_flag=True,
        help="Exit 1 where CANDIDATE is worse than that result, or than a BASELINE that is itself an artifact.",
    ),
)


def check_options(command: Command) -> Command:
    """Gives the command all of them, in the order of the help."""
    for option in reversed((*TEXT, *LIMITS, *MEASURED, *ACROSS)):
        command = option(command)
    return command
