"""The original's figures in a file: a check without its weights says what one with them says, and nothing else of other text."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from refusals import refusal, refusal_of_command

from compress.check.carried import Carried
from compress.disk import cache
from compress.recipe.check import Check, Generate

ASKED = ("--prompts", "self", "--samples", "3", "--length", "24")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def int8(compress_cli, small, tmp_path_factory) -> Path:
    """The small model in int8, its states in int8 too."""
    folder = tmp_path_factory.mktemp("int8")
    (folder / "r.yaml").write_text(
        f"version: 1\nmodel: {small}\npasses: [quantize: {{weights: int8}}, state_precision: {{ssm_state: {{format: int8}}}}]\n"
        "export: [onnx: {}]\n"
    )
    result = compress_cli("apply", folder / "r.yaml", "-o", folder / "out")
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture(scope="module")
def bare(small, tmp_path_factory) -> Path:
    """The original without its weights."""
    return Path(
        shutil.copytree(
            small, tmp_path_factory.mktemp("bare") / "model", ignore=shutil.ignore_patterns("*.safetensors")
        )
    )


@pytest.fixture(scope="module")
def saved(compress_cli, small, int8, tmp_path_factory):
    """The file of a check with everything that it may hold, and that check's result."""
    folder = tmp_path_factory.mktemp("saved")
    result = compress_cli("check", small, int8, *ASKED, "--generate", "2", "--tokens", "4", "--limits", "default",
                          "--save-baseline", folder / "base.tar", "--json", folder / "with.json")  # fmt: skip
    assert result.exit_code in (0, 1), result.output
    return folder / "base.tar", json.loads((folder / "with.json").read_text())


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Another machine: nothing is in its cache."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def test_without_the_weights_a_check_says_the_same(compress_cli, bare, int8, saved, elsewhere, tmp_path):
    path, before = saved
    asked = (*ASKED, "--generate", "2", "--tokens", "4", "--limits", "default", "--baseline", path)
    result = compress_cli("check", bare, int8, *asked, "--json", tmp_path / "without.json")
    assert result.exit_code in (0, 1), result.output
    after = json.loads((tmp_path / "without.json").read_text())
    for part in ("checks", "by_position", "generated", "state_health", "state_saturation", "prompts"):
        assert after[part] == before[part], part
        assert after[part]
    assert any(row["limit"] is not None for row in after["checks"]), "those of the formats, which the file tells"
    assert after["baseline"]["sha256"] == before["baseline"]["sha256"]
    assert (after["audit"], after["layer_audit"]) == ([], [])
    assert any("not audited" in remark for remark in after["remarks"])
    assert not [entry for entry in (tmp_path / "cache").rglob("*") if entry.is_file()], "nothing is copied"


def test_fewer_prompts_and_figures_may_be_asked_for(compress_cli, bare, int8, saved, elsewhere):
    result = compress_cli("check", bare, int8, *ASKED, "--no-states", "--baseline", saved[0])
    assert result.exit_code == 0, result.output


def test_weights_that_are_there_are_audited_and_must_be_those_of_the_file(compress_cli, small, int8, saved, tmp_path):
    asked = (*ASKED, "--no-states", "--baseline", saved[0], "--json", tmp_path / "r")
    assert compress_cli("check", small, int8, *asked).exit_code == 0
    assert json.loads((tmp_path / "r").read_text())["audit"]
    other = Path(shutil.copytree(small, tmp_path / "other"))
    weights = bytearray((other / WEIGHTS).read_bytes())
    weights[-2] ^= 1
    (other / WEIGHTS).write_bytes(weights)
    assert "other weights" in refusal_of_command(compress_cli("check", other, int8, *asked))
    assert compress_cli("check", other, int8, *asked, "--no-audit").exit_code == 0, "then they are not read"


def test_a_file_without_states_leaves_them_out_and_says_so(compress_cli, small, bare, int8, elsewhere, tmp_path):
    path = tmp_path / "base.tar"
    assert compress_cli("check", small, small, *ASKED, "--save-baseline", path).exit_code == 0
    result = compress_cli("check", bare, int8, *ASKED, "--baseline", path, "--json", tmp_path / "r")
    found = json.loads((tmp_path / "r").read_text())
    assert (result.exit_code, found["state_health"]) == (0, [])
    assert any("states were not measured" in remark for remark in found["remarks"])
    refused = refusal_of_command(compress_cli("check", bare, int8, *ASKED, "--states", "--baseline", path))
    assert "--no-states" in refused


@pytest.mark.parametrize(
    ("changes", "seed", "said"),
    [
        ({"length": 16}, 0, "length 24, this check has 16"),
        ({"samples": 2}, 0, "samples 3, this check has 2"),
        ({}, 1, "seed 0, this check has 1"),
        ({"prompts": ("self", "heldout")}, 0, "prompts 'heldout'; its prompts: self"),
        ({"tasks": ("t.jsonl",)}, 0, "tasks 't.jsonl'; its tasks: none"),
        ({"generate": Generate(prompts=3, tokens=4)}, 0, 'generated texts ({ "prompts": 2'),
    ],
    ids=str,
)  # fmt: skip
def test_other_settings_are_refused_by_what_differs(saved, changes, seed, said):
    settings = Check(**({"prompts": ("self",), "samples": 3, "length": 24} | changes))
    assert said in refusal(lambda: Carried(saved[0]).refuse_other_settings(settings, seed))


def test_another_model_is_refused_by_the_key_that_differs(compress_cli, nemotron, bare, int8, saved, tmp_path):
    assert "another model" in refusal_of_command(compress_cli("check", nemotron, int8, *ASKED, "--baseline", saved[0]))
    other = Path(shutil.copytree(bare, tmp_path / "other"))
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 0.25}))
    assert "rms_norm_eps is 1e-06, not 0.25" in refusal_of_command(
        compress_cli("check", other, int8, *ASKED, "--baseline", saved[0])
    )


def test_text_that_is_another_now_is_refused_by_name(compress_cli, tiny, elsewhere, tmp_path):
    text, path = tmp_path / "mine.txt", tmp_path / "base.tar"
    asked = ("check", tiny, tiny, "--no-audit", "--prompts", text, "--samples", "1", "--length", "8")
    text.write_text("Once there was a cat who liked to sing.")
    assert compress_cli(*asked, "--save-baseline", path).exit_code == 0
    text.write_text("Once there was a dog who liked to sing.")
    assert f"prompts '{text}'" in refusal_of_command(compress_cli(*asked, "--baseline", path))


@pytest.mark.parametrize("place", [0.1, 0.2, 0.5, 0.7])
def test_a_file_that_was_cut_short_is_refused(saved, tmp_path, place):
    whole = saved[0].read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: int(place * len(whole))])
    with tarfile.open(saved[0]) as archive:
        names = [member.name for member in archive.getmembers()]

    def read_all() -> None:
        carried = Carried(tmp_path / "cut.tar")
        for name in names[1:]:
            carried.entry(name)

    assert "cut.tar" in refusal(read_all)


def test_an_entry_that_was_changed_is_refused(compress_cli, bare, int8, saved, tmp_path):
    damaged = Path(shutil.copyfile(saved[0], tmp_path / "damaged.tar"))
    with tarfile.open(damaged) as archive:
        offset = next(member.offset_data for member in archive.getmembers() if member.name.startswith("baseline/"))
    with open(damaged, "r+b") as file:
        file.seek(offset + 100)
        file.write(b"?")
    refused = compress_cli("check", bare, int8, *ASKED, "--no-states", "--baseline", damaged)
    assert "does not agree with its digest" in refusal_of_command(refused)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 10240])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "none").write_bytes(content)
    assert "--save-baseline" in refusal(lambda: Carried(tmp_path / "none"))


def test_a_file_that_cannot_be_written_or_read_is_refused_before_the_work(
    compress_cli, small, saved, tmp_path, monkeypatch
):
    monkeypatch.setattr("compress.check.judge.check", lambda *_, **__: pytest.fail("it began"))
    for option in ("--save-baseline", "--baseline"):
        for path in (tmp_path, tmp_path / "nowhere" / "base.tar"):
            assert str(path) in refusal_of_command(compress_cli("check", small, small, *ASKED, option, path))
    both = ("--save-baseline", tmp_path / "base.tar", "--baseline", saved[0])
    assert "one of the two" in refusal_of_command(compress_cli("check", small, small, *ASKED, *both))


def test_a_work_that_fails_leaves_no_file(compress_cli, small, tmp_path, monkeypatch):
    path = tmp_path / "base.tar"
    path.write_text("what was there")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    result = compress_cli("check", small, small, *ASKED, "--save-baseline", path)
    assert result.exit_code == 3, result.output
    assert str(path) in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["base.tar"]
    assert path.read_text() == "what was there"


def test_entries_that_the_cache_drops_meanwhile_are_carried(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    with cache.noting() as noted:
        for number in range(cache.NEWEST_KEPT + 3):
            path = cache.folder("things") / f"{number}.bin"
            cache.entry(path, lambda file, number=number: file.write(b"%d" % number)).close()
        assert len(list(path.parent.iterdir())) == cache.NEWEST_KEPT
        for name, file in noted.items():
            file.seek(0)
            assert file.read()[: -cache.DIGEST_BYTES] == name.removeprefix("things/").removesuffix(".bin").encode()
