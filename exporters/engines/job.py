"""What is said between our process and the one that builds, as lines of JSON."""

from typing import TypedDict

from compress.output_folder.build_facts import ProfileFacts


class Job(TypedDict):
    """Of `model`, a graph, an `engine` is written. `timings` is the file of a timing cache, read and written."""

    model: str
    engine: str
    timings: str
    profiles: list[ProfileFacts]


class Loaded(TypedDict):
    """A builder that works."""

    name: str
    version: str


class ParserError(TypedDict):
    description: str
    node: str
    operator: str


class Built(TypedDict):
    """`constants`: the types of the parsed network's constants, by name; of those that are only widened again, that of what is
    stored. `inspected` is what the inspector says of the engine, JSON, where a GPU opened it; `unopened` why the GPU that is here
    does not. Without a GPU both are None."""

    builder: Loaded
    seconds: float
    peak_rss_bytes: int | None
    weight_bytes: int | None
    activation_bytes: int | None
    not_for: list[str]
    constants: dict[str, str]
    inspected: str | None
    unopened: str | None


class Answer(TypedDict, total=False):
    """One of these. `progress` is a share of the build; the others end it."""

    progress: float
    loaded: Loaded
    built: Built
    unusable: str
    refused: list[ParserError]
    failed: str
