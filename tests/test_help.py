"""What a newcomer is told: help, completion, and what was meant where a recipe is not found."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from refusals import refusal, refusal_of_command

import cli
from compress.recipe import resources
from compress.terminal import usage

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def words(text: str) -> str:
    """The text without its line breaks and indentation."""
    return " ".join(text.split())


# --- help


@pytest.fixture
def told(compress_cli) -> str:
    result = compress_cli("-h")
    assert result.exit_code == 0, result.output
    return words(result.stdout)


@pytest.mark.parametrize("name", sorted(cli.main.commands))
def test_the_help_has_every_command_s_whole_summary(told, name):
    assert f" {name} {words(cli.main.commands[name].help)}".removesuffix(".") in told
    assert "..." not in told.partition("Commands:")[2]


@pytest.mark.parametrize("code", ["0", "1", "2", "3", "130, 143, 129"])
def test_the_help_has_the_exit_codes_of_the_readme(told, code):
    (in_readme,) = re.findall(rf"^\| {code} \| (\w+)", README, re.MULTILINE)
    assert re.search(rf" {code} (\w+)", told.partition("Exit codes:")[2])[1].lower() in ("the", in_readme.lower())


@pytest.mark.parametrize("name", ["COMPRESS_CACHE", "COMPRESS_TRACEBACK"])
def test_the_help_has_the_environment(told, name):
    assert name in told.partition("Environment:")[2]


@pytest.mark.parametrize("line", [line for line, _ in usage.EXAMPLES])
def test_an_example_is_a_command_line_that_is_understood(told, line):
    assert line in told
    program, name, *arguments = shlex.split(line)
    assert program == "compress"
    cli.main.commands[name].make_context(name, arguments, parent=click.Context(cli.main, **cli.main.context_settings))


@pytest.mark.parametrize("name", ["", *sorted(cli.main.commands)])
def test_a_short_option_asks_for_help(compress_cli, name):
    short, long = (compress_cli(*name.split(), option) for option in ("-h", "--help"))
    assert (short.exit_code, short.stderr, short.stdout) == (0, "", long.stdout)
    assert short.stdout.startswith("Usage:")


def test_a_short_option_asks_for_the_version(compress_cli):
    short, long = compress_cli("-V"), compress_cli("--version")
    assert (short.exit_code, short.stdout) == (0, long.stdout)


def test_a_document_that_is_not_there_is_refused_with_the_nearest(compress_cli):
    assert "did you mean 'quantization'" in refusal_of_command(compress_cli("docs", "quantisation"))
    assert "did you mean 'quantization'" in refusal_of_command(compress_cli("docs", "QUANTISATION"))


@pytest.mark.parametrize("name", ["README", "README.md", "docs/roles.md", "roles.md", "Roles"])
def test_a_document_is_found_by_the_name_of_its_file(compress_cli, name):
    file = ROOT / ("README.md" if "README" in name else "docs/roles.md")
    assert compress_cli("docs", name).stdout == file.read_text()


# --- completion, as the README has it


@pytest.fixture
def completed(tmp_path):
    """What bash offers for a line that was begun, after the README's line for ~/.bashrc."""
    program = tmp_path / "bin" / "compress"
    program.parent.mkdir()
    # as pip writes it
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom cli import main\nmain()\n"
    )
    program.chmod(0o755)
    (line,) = re.findall(r"`(eval [^`]*_COMPRESS_COMPLETE=bash_source[^`]*)`", README)

    def offered(*begun: str) -> list[str]:
        given = " ".join(map(shlex.quote, begun))
        script = f"{line}\nCOMP_WORDS=({given}) COMP_CWORD={len(begun) - 1}\n_compress_completion compress\n"
        environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
        command = ["bash", "--norc", "-c", script + 'printf "%s\\n" "${COMPREPLY[@]}"']
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return result.stdout.split()

    return offered


def test_the_readme_s_line_completes_commands_and_recipes(completed):
    assert completed("compress", "se") == ["sensitivity"]
    assert completed("compress", "apply", "tiny") == ["tiny-int8"]
    assert "--overwrite" in completed("compress", "apply", "tiny-int8", "--ov")


# --- recipes that are not found


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


RECIPE = "version: 1\npasses: [quantize: {}]\n"


@pytest.mark.parametrize(
    ("there", "given"),
    [
        ("own.yaml", "own.yml"),
        ("own.yml", "own.yaml"),
        ("own.yaml", "own"),
        ("own.yml", "own"),
        ("own.v2.yaml", "own.v2"),
        ("deep/own.yaml", "deep/own.yml"),
        ("deep/own.yaml", "deep/own"),
        ("own.yaml", "onw.yaml"),
        ("own.yaml", "OWN.YAML"),
    ],
)
def test_the_recipe_that_was_meant_is_suggested(compress_cli, folder, there, given):
    (folder / there).parent.mkdir(exist_ok=True)
    (folder / there).write_text(RECIPE)
    (folder / "other.txt").touch()
    said = refusal_of_command(compress_cli("apply", given))
    assert f"recipe '{given}' is neither" in said
    assert f"did you mean '{there}'?" in said


def test_a_file_far_from_every_name_is_not_suggested(compress_cli, folder):
    (folder / "something-else.yaml").write_text(RECIPE)
    said = refusal_of_command(compress_cli("apply", "q.yaml"))
    assert "something-else" not in said
    assert "tiny-int8" in said


@pytest.mark.parametrize("given", [".", "..", "deep", "./deep/", "/"])
@pytest.mark.parametrize("command", ["apply", "sensitivity"])
def test_a_folder_is_called_a_folder(compress_cli, folder, command, given):
    (folder / "deep").mkdir()
    said = refusal_of_command(compress_cli(command, given))
    assert f"recipe '{given}' is a folder; expected a YAML file or the name of a shipped recipe" in said


def test_the_one_recipe_in_a_folder_is_suggested(compress_cli, folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "own.yml").write_text(RECIPE)
    (folder / "deep" / "limits.yaml").write_text("kl_divergence_mean: 0.01\n")
    assert "did you mean 'deep/own.yml'?" in refusal_of_command(compress_cli("apply", "deep"))


def test_of_an_output_the_recipe_as_it_was_given_is_suggested(compress_cli, folder):
    (folder / "out").mkdir()
    for name in ("recipe.resolved.yaml", "recipe.yaml"):
        (folder / "out" / name).write_text(RECIPE)
    assert "did you mean 'out/recipe.yaml'?" in refusal_of_command(compress_cli("apply", "out"))


def test_of_a_model_it_is_said_how_it_is_given(compress_cli, small):
    assert f"-m {small}" in refusal_of_command(compress_cli("apply", small))


def test_a_name_too_long_for_a_file_is_refused(compress_cli):
    assert "neither a file" in refusal_of_command(compress_cli("apply", "x" * 300))


def test_a_shipped_name_wins_over_a_folder_of_that_name(folder):
    (folder / "int8").mkdir()
    assert resources.find_recipe("int8") == resources.shipped_recipes()["int8"]
    assert "folder" in refusal(lambda: resources.find_recipe("./int8/"))


# --- a checkpoint within an output


def test_an_output_folder_is_exported_by_its_checkpoint(compress_cli, applied, tmp_path):
    whole, part = (tmp_path / name for name in ("whole", "part"))
    result = compress_cli("export", applied, "-o", whole)
    assert result.exit_code == 0, result.output
    assert compress_cli("export", applied / "checkpoint", "--to", "onnx", "-o", part).exit_code == 0
    for name in ("model.onnx", "model.onnx.data"):
        assert (whole / name).read_bytes() == (part / name).read_bytes() == (applied / "onnx" / name).read_bytes()


def test_what_has_no_checkpoint_is_not_exported(compress_cli, applied, tmp_path):
    for given in (applied / "onnx", applied / "onnx" / "model.onnx", tmp_path):
        said = refusal_of_command(compress_cli("export", given, "-o", tmp_path / "out"))
        assert f"{given}: " in said
        assert "checkpoint folder" in said
    assert not (tmp_path / "out").exists()


def test_the_default_folder_of_an_export_stands_beside_the_output(compress_cli, small, tmp_path):
    assert compress_cli("apply", "tiny-int8", "-m", small, "-o", tmp_path / "x", "--set", "check=null").exit_code == 0
    assert compress_cli("export", tmp_path / "x").exit_code == 0
    assert (tmp_path / "x-onnx" / "model.onnx").is_file()
