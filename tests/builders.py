"""Builders of engines in tests: none, as in an environment without the extra, whether it is there or not; or a stand-in."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from exporters.engines import library, process

FOUND = library.why_missing
NONE = f"no builder is installed; {library.HOW_TO_BUILD}"


@contextmanager
def without() -> Iterator[None]:
    with _looked_for(lambda: NONE):
        yield


@contextmanager
def installed() -> Iterator[None]:
    """Whatever there is."""
    with _looked_for(FOUND):
        yield


@contextmanager
def _looked_for(why_missing) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "why_missing", why_missing)
        process._found.cache_clear()
        yield
    process._found.cache_clear()


@contextmanager
def stand_in(folder: Path, does: str = "builds") -> Iterator[None]:
    """A package `tensorrt` in `folder`, which ends as it is told (fake_tensorrt.py), and no other builder that works."""
    package = folder / "packages" / "tensorrt"
    package.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("fake_tensorrt.py"), package / "__init__.py")
    for other in (library.BINDING, library.BUNDLE):  # hides those that may be installed
        (package.parent / other).mkdir(exist_ok=True)
        (package.parent / other / "__init__.py").touch()
    with installed(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(package.parent)
        patch.setenv("COMPRESS_FAKE_BUILDER", does)
        yield
