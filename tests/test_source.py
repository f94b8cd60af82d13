"""Finding the model a user names: a local folder, shipped data or the hub, and its tokenizer. No test leaves the machine."""

import contextlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from refusals import refusal

from compress.errors import InputError
from compress.recipe.source import Source, load_tokenizer, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# ---- local folders and shipped data


def test_an_absolute_path_is_that_folder(tmp_path):
    (tmp_path / "my-jamba").mkdir()
    assert resolve(str(tmp_path / "my-jamba")) == Source("my-jamba", tmp_path / "my-jamba", None)


def test_a_relative_path_is_sought_beside_the_recipe_then_in_the_working_folder(tmp_path, monkeypatch):
    recipes, working = tmp_path / "recipes", tmp_path / "working"
    for folder in (recipes / "both", working / "both", working / "only-here"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(working)
    assert resolve("both", recipes).folder == recipes / "both"
    assert resolve("both").folder == working / "both"
    assert resolve("only-here", recipes).folder == working / "only-here"


def test_the_shipped_model_is_found_from_anywhere(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("models/tiny-jamba", tmp_path).folder.samefile(tiny)


def test_a_users_own_folder_comes_before_the_shipped_one(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny-jamba").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("models/tiny-jamba").folder == tmp_path / "models" / "tiny-jamba"


def test_the_current_folder_is_called_by_its_own_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(".").name == tmp_path.name


@pytest.fixture
def no_hub(monkeypatch):
    """Fails the test if the hub is asked."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))


MALFORMED = ["jamba", "a/b/c", "/nowhere/at/all", "owner/", "/name", "owner/name@", "owner/name@v1@v2", "owner /name",
             "owner/name\n", "https://huggingface.co/owner/name", "owner/näme?", "a\0/b", "x" * 5000]  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED, ids=lambda name: ascii(name)[:24])
def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_refused_without_asking_the_hub(no_hub, name):
    with pytest.raises(InputError, match=r"no such folder.*OWNER/NAME"):
        resolve(name)


def test_a_file_is_no_model(no_hub, tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert "model.safetensors" in refusal(lambda: resolve(str(tmp_path / "model.safetensors")))


# ---- the hub


@pytest.fixture
def asked(monkeypatch, tmp_path) -> dict:
    """Answers downloads with an empty snapshot and records what was asked."""
    snapshot, record = tmp_path / "snapshots" / COMMIT, {}
    snapshot.mkdir(parents=True)

    def download(repo_id, **options):
        record.update(options, repo_id=repo_id, folder=snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return record


def test_a_hub_id_is_downloaded_and_its_commit_recorded(asked):
    assert resolve("owner/Jamba-1.5") == Source("owner/Jamba-1.5", asked["folder"], COMMIT)
    assert asked["repo_id"] == "owner/Jamba-1.5" and asked["revision"] is None


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", COMMIT, "my_branch-2"])
def test_a_revision_behind_the_id_is_the_one_downloaded(asked, revision):
    source = resolve(f"owner/name@{revision}")
    assert asked["repo_id"] == "owner/name" and asked["revision"] == revision
    assert (source.name, source.revision) == ("owner/name", COMMIT)


def downloaded(asked: dict, names: list[str]) -> list[str]:
    """Which of a repository's files the hub client would fetch for what was asked."""
    patterns = {key: asked.get(key) for key in ("allow_patterns", "ignore_patterns")}
    return list(filter_repo_objects(names, **patterns))


def test_weights_configuration_tokenizer_and_papers_are_downloaded(asked):
    resolve("owner/name")
    names = ["config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors",
             "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
             "merges.txt", "special_tokens_map.json", "chat_template.jinja", "README.md", "LICENSE", "LICENSE.md",
             "NOTICE"]  # fmt: skip
    assert downloaded(asked, names) == names


@pytest.mark.parametrize("name", [
    "modeling_jamba.py", "configuration_jamba.py", "tokenization_jamba.py", "tokenizer.py", "tokenizer_utils.py",
    "tokenizer/fast.py",
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "model.ckpt", "optimizer.pkl",
    "tokenizer.bin", "tokenizer.pkl", "tokenizer.pickle", "training_args.bin",
])  # fmt: skip
def test_code_and_pickles_are_never_downloaded(asked, name):
    resolve("owner/name")
    assert downloaded(asked, [name]) == []


@pytest.mark.parametrize("error", [
    LocalEntryNotFoundError("cannot find the requested files\nin the cache"),
    HFValidationError("Repo id must use alphanumeric chars"),
    ConnectionError("refused"),
    TimeoutError(),
    OSError(28, "No space left on device"),
    ValueError("bad value"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_a_hub_that_does_not_deliver_is_refused_in_one_sentence(monkeypatch, error):
    def download(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = refusal(lambda: resolve("owner/name@v1"))
    assert "'owner/name'" in message and "hub" in message


class Unhelpful(http.server.BaseHTTPRequestHandler):
    """A local server that refuses to connect to others as a proxy, and hangs up when asked anything itself."""

    def do_CONNECT(self):
        self.send_error(403)

    def do_GET(self):
        self.close_connection = True

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def unhelpful_server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unhelpful) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


RESOLVE = """
from compress.errors import InputError
from compress.recipe.source import resolve
try:
    resolve("owner/name")
except InputError as error:
    print(error)
"""


def resolve_elsewhere(cache: Path, **environment: str) -> subprocess.CompletedProcess:
    """`resolve` in a process of its own, which reads these settings of the hub client at its start."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    settings = inherited | {"HF_HOME": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    return subprocess.run([sys.executable, "-c", RESOLVE], env=settings, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("setting", ["HF_ENDPOINT", "HTTPS_PROXY"])
@pytest.mark.parametrize("behaviour", ["nothing listens", "an unhelpful server"])
def test_a_hub_that_cannot_be_reached_is_refused_in_one_sentence(tmp_path, setting, behaviour):
    with unhelpful_server() as address:
        target = address if behaviour == "an unhelpful server" else "http://127.0.0.1:1"
        result = resolve_elsewhere(tmp_path, **{setting: target})
    assert result.returncode == 0, result.stderr[-500:]
    assert result.stdout.count("\n") == 1 and "'owner/name'" in result.stdout and "hub" in result.stdout


# ---- the tokenizer


@pytest.fixture
def tokenizer_folder(tiny, tmp_path) -> Path:
    """The shipped tokenizer and configuration in a folder that a test may damage."""
    for path in [*tiny.glob("tokenizer*"), tiny / "config.json", tiny / "chat_template.jinja"]:
        shutil.copy(path, tmp_path)
    return tmp_path


def test_a_sound_tokenizer_is_that_of_the_folder(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    text = "A state space model, and attention."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer) <= json.loads((tokenizer_folder / "config.json").read_text())["vocab_size"]


def test_a_folder_without_tokenizer_files_is_refused(small):
    message = refusal(lambda: load_tokenizer(small))
    assert str(small) in message and "tokenizer" in message


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"null", b"\xff\xfe\x00", b'{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_refused(tokenizer_folder, content):
    (tokenizer_folder / "tokenizer.json").write_bytes(content)
    (tokenizer_folder / "tokenizer.model").unlink()
    message = refusal(lambda: load_tokenizer(tokenizer_folder))
    assert str(tokenizer_folder) in message and "tokenizer" in message


def test_a_truncated_tokenizer_is_refused(tokenizer_folder):
    path = tokenizer_folder / "tokenizer.json"
    os.truncate(path, path.stat().st_size // 2)
    assert str(tokenizer_folder) in refusal(lambda: load_tokenizer(tokenizer_folder))


def test_a_sentencepiece_file_of_junk_alone_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"junk" * 100)
    assert str(tmp_path) in refusal(lambda: load_tokenizer(tmp_path))


def test_a_tokenizer_configuration_without_a_vocabulary_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert str(tmp_path) in refusal(lambda: load_tokenizer(tmp_path))


@pytest.mark.parametrize("error", [Exception("damaged"), AssertionError(), Exception("\n"), KeyError("added_tokens")],
                         ids=["with a message", "without a message", "a blank message", "a missing key"])  # fmt: skip
def test_whatever_a_tokenizer_fails_with_is_one_sentence(tokenizer_folder, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    assert str(tokenizer_folder) in refusal(lambda: load_tokenizer(tokenizer_folder))


def test_code_in_a_model_folder_is_never_run(tokenizer_folder):
    marker = tokenizer_folder / "ran"
    (tokenizer_folder / "custom.py").write_text(f"open({str(marker)!r}, 'w')\nclass Custom:\n    pass\n")
    path = tokenizer_folder / "tokenizer_config.json"
    custom = {"auto_map": {"AutoTokenizer": ["custom.Custom", None]}, "tokenizer_class": "Custom"}
    path.write_text(json.dumps(json.loads(path.read_text()) | custom))
    with contextlib.suppress(InputError):
        load_tokenizer(tokenizer_folder)
    assert not marker.exists()


def test_an_output_of_apply_says_where_its_model_is(applied):
    assert str(applied / "checkpoint") in refusal(lambda: resolve(str(applied)))
