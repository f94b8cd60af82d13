"""Shared fixtures: the reference model, small random models of awkward shapes, and one finished `apply` of the quick start."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so it cannot wait for a fixture
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # waiting threads sleep: on shared cores spinning takes four times as long

import builders
import pytest
import torch
from click.testing import CliRunner
from jamba_models import make_jamba

import cli
from compress.apply import pipeline
from compress.recipe import resources
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tests never touch the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_builder_of_engines():
    """As in CI's first stage, also where the extra is installed: engines take seconds each."""
    with builders.without():
        yield


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The shipped reference model."""
    return resources.folder("models") / "tiny-jamba"


@pytest.fixture(scope="session")
def nemotron() -> Path:
    """The second reference model, which only the checkout has."""
    return Path(__file__).resolve().parents[1] / "models" / "tiny-nemotron-h"


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A random Jamba of awkward shapes: one KV head, dt_rank 10, expert period 3."""
    return make_jamba(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def applied(tmp_path_factory, tiny) -> Path:
    """The output of the quick-start recipe on the reference model, check off."""
    loaded = load_recipe("tiny-int8", ("check=null",))
    out = tmp_path_factory.mktemp("applied") / "tiny-int8"
    pipeline.apply(pipeline.Job(loaded, resolve(str(tiny)), out))
    return out


@pytest.fixture(scope="session")
def compress_cli():
    """Runs the command in this process: `compress_cli("apply", ...)` has `.exit_code`, `.stdout` and `.stderr`."""
    return lambda *arguments, **options: CliRunner().invoke(cli.main, [str(a) for a in arguments], **options)
