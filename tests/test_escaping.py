"""Names come from files and may hold anything: none reaches the terminal, report.md or the model card as it is."""

import html
import re
import shutil
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from refusals import refusal_of_command
from safetensors.torch import load_file, save_file

from compress.report import markdown as report_markdown
from compress.terminal import output, progress
from compress.terminal.escaping import code, code_block, markdown, printable, without_controls

HOSTILE = "a\x1b[2J\x07b\nc|d`e``f<script>g</script>[h](i)*j*&amp;\\k\u202el\x9bm"
SHOWN = "a\\x1b[2J\\x07b\\nc|d`e``f<script>g</script>[h](i)*j*&amp;\\k\\u202el\\x9bm"
QUICK = ("--set", "check.prompts=[self]", "--set", "check.samples=1", "--set", "check.length=8")


def has_controls(text: str) -> bool:
    return bool(re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text))


def rendered(text: str) -> str:
    """What a reader sees of Markdown: HTML without its tags. The renderer is not ours."""
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "<script" not in page
    assert "<a " not in page
    assert "<em>" not in page
    return html.unescape(re.sub(r"<[^>]*>", "", page))


def test_a_name_on_a_terminal_is_one_line_of_visible_characters():
    assert printable(HOSTILE) == SHOWN
    assert printable("Größe 日本 naïve 'x' \\") == "Größe 日本 naïve 'x' \\"
    assert printable("\udcff/model") == "\\udcff/model"
    assert printable(Path("a\nb")) == "a\\nb"


@pytest.mark.parametrize(
    "name", [HOSTILE, "plain", "`", "``a", "a|b", "_x_ # - 1. ![x](y)", "<b>", "http://x.y", "a\\|b"]
)
def test_a_name_in_markdown_reads_as_it_is(name):
    assert printable(name) in rendered(f"made from {markdown(name)}: yes")
    assert printable(name) in rendered(f"made from {code(name)}: yes")
    assert printable(name) in rendered(f"| a | b |\n|---|---|\n| {markdown(name)} | end |")
    assert f"{printable(name)}\n" in rendered(f"# {markdown(name)}")


@pytest.mark.parametrize("text", ["a: 1", "a: '```'\n````\n<script>", "``` b"])
def test_a_block_of_text_cannot_end_itself(text):
    page = MarkdownIt("commonmark").render(f"before\n\n{code_block(text, 'yaml')}\n\nafter")
    assert page.count("<pre>") == 1
    assert html.unescape(re.search(r"<code[^>]*>(.*)</code>", page, re.DOTALL)[1]) == text + "\n"


def test_generated_text_keeps_its_lines_but_not_what_steers_a_terminal():
    assert (
        without_controls("one\ttwo\nthree \x1b[31m\x9b\r\x08 🦊👩‍👩 é")
        == "one\ttwo\nthree \\x1b[31m\\x9b\\r\\x08 🦊👩‍👩 é"
    )


@pytest.fixture(scope="module")
def hostile(small, tmp_path_factory) -> Path:
    """The small model in a folder with a bad name."""
    return Path(shutil.copytree(small, tmp_path_factory.mktemp("hostile") / HOSTILE.replace("/", "")))


def test_a_hostile_model_name_stays_harmless_everywhere(compress_cli, hostile, tmp_path):
    shown = printable(hostile.name)
    result = compress_cli(
        "apply", "tiny-int8", "-m", hostile, "-o", tmp_path / "out", *QUICK, "--set", "check.limits={}"
    )
    assert result.exit_code == 0, result.output
    report, card = ((tmp_path / "out" / name).read_text() for name in ("report.md", "checkpoint/README.md"))
    assert not any(map(has_controls, (result.output, report, card)))
    assert shown in result.stdout.replace("\n", "")
    assert shown in rendered(report)
    assert shown in rendered(card)


def test_a_plan_shows_hostile_names_in_their_lines(compress_cli, hostile, tmp_path):
    arguments = ("apply", "tiny-int8", "-m", hostile, "-o", tmp_path / "o\x1b[1m\nverdict: pass", "--dry-run")
    result = compress_cli(*arguments, *QUICK)
    assert result.exit_code == 0, result.output
    assert not has_controls(result.stdout)
    assert not any(line.startswith("verdict") for line in result.stdout.splitlines())


def test_an_error_about_a_hostile_name_is_one_harmless_sentence(compress_cli, small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "mod\x1b]0;title\x07el\nnext"))
    tensors = load_file(folder / "model.safetensors")
    tensors["evil\x1b[2J\r\nname"] = tensors["model.final_layernorm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = refusal_of_command(compress_cli("check", folder, folder))
    assert not has_controls(said)
    assert "evil\\x1b[2J\\r\\nname" in said
    for arguments in (
        ("inspect", "no\nsuch\x1b[1mmodel"),
        ("recipes", "a\nb\x1b"),
        ("run", folder / "x\ny"),
        ("a\n\x1bb",),
    ):
        assert not has_controls(refusal_of_command(compress_cli(*arguments)))


BRACKETS = ["prompts: [/red] a [bold", "[link=x]y[/]", ":fox: [1]"]


@pytest.mark.parametrize("name", BRACKETS)
def test_brackets_and_colons_are_no_markup_on_a_terminal(monkeypatch, capsys, name):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    with progress.task(name + "\x1b[2J\nx", 3) as advance:
        advance(3)
    output.console(stderr=True).print(name)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert said.count(name) >= 2
    assert "\\x1b[2J\\nx" in said


def test_prompts_in_a_folder_with_brackets_can_be_checked_on_a_terminal(compress_cli, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    folder = tmp_path / "[/bold] [0]"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("A fox and a hare went to the river, and there they met a bear.")
    result = compress_cli("check", tiny, tiny, "--prompts", folder / "mine.txt", "--samples", 1, "--length", 8)
    assert result.exit_code == 0, result.output


def test_rows_of_hostile_prompts_stay_in_their_row():
    entry = {"artifact": "onnx", "phase": "decode", "prompts": HOSTILE, "metric": "m", "value": 1.0, "limit": None}
    line = report_markdown._check_row(entry | {"outcome": None, "more_tokens": None})
    assert "\n" not in line
    assert SHOWN in rendered(f"| a | b | c | d | e | f | g |\n|---|---|---|---|---|---|---|\n{line}\n")
