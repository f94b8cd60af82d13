"""report.html: what stands in it, that nothing escapes its place, and that its pictures say what the figures say.
How it looks in a browser: tests/compilers/test_pages.py."""

import html
import itertools
import re
import struct
import zlib
from html.parser import HTMLParser

import pytest
import report_samples
from pages import Page, assert_needs_nothing_else
from report_samples import HOSTILE

from compress.checkpoint.reader import Checkpoint
from compress.disk.json_files import read_json
from compress.passes import Coverage, Pass, Trial
from compress.report.html import charts, heat, pages, picture, plots, report_page, scales, strip
from compress.report.passes import PassDone
from compress.strict.models import Strict
from compress.terminal.escaping import printable

VOID = {"meta", "link", "br", "img", "input", "circle", "path", "line", "rect"}


def page_of(sample: dict, shown=None) -> tuple[str, Page]:
    text = report_page.render(sample, [], shown, "version: 1\nmodel: tiny\n")
    return text, Page(text)


class Nesting(HTMLParser):
    """Whether every tag is closed where it was opened."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.wrong = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append((tag, self.getpos()))


def test_the_page_says_everything_and_needs_nothing_else():
    text, page = page_of(report_samples.report())
    assert text.startswith("<!DOCTYPE html>")
    assert_needs_nothing_else(page, text)
    nesting = Nesting(text)
    assert (nesting.open, nesting.wrong) == ([], [])
    said = " ".join(page.texts)
    for words in (
        "fail", "model.layers.1.feed_forward.experts.3.down_proj.weight", "layer 1, moe, expert 3", "better than the baseline",
        "5,365,904", "Size against quality", "Divergence by position", "Recall by distance", "State memory by context",
        "Weight audit: 2 of 10 tensors fail", "The fox went to the river", "met a bear.", "facts", "model: tiny", "torch 2.9.0",
        "Flips", "Generated texts", "heldout: 24 windows, 12,288 tokens",
    ):  # fmt: skip
        assert words in said, words
    assert len(text.encode()) < 100_000


def test_what_is_wrong_stands_before_anything_is_drawn():
    text, _ = page_of(report_samples.report())
    first = text[: text.index("<svg")]
    for failure in ("experts.3.down_proj", "mamba.dt_proj", "layer 1, moe, expert 3", "perplexity_ratio"):
        assert failure in first


def test_what_is_not_there_has_no_place_in_the_page():
    sample = report_samples.without_findings(report_samples.report())
    text, page = page_of(sample)
    said = " ".join(page.texts)
    for words in (
        "Audit",
        "Worst prompts",
        "Divergence",
        "Recall",
        "Flips",
        "Tasks",
        "quality",
        "Experts in",
        "single states",
    ):
        assert words not in said, words
    assert page.tags.count("figure") == 1, "state memory is known without a check"
    assert "not checked" in said
    assert Nesting(text).wrong == []


def test_a_check_has_a_page_of_the_same_kind():
    text = report_page.render_check(report_samples.check())
    page = Page(text)
    assert_needs_nothing_else(page, text)
    assert "out/tiny against models/tiny" in page.texts
    assert page.tags.count("figure") == 2 and "experts.3.down_proj" in text


def test_two_artifacts_are_shown_beside_each_other():
    sample = report_samples.check() | {"change": report_samples.changed(), "against_result": report_samples.against()}
    text = report_page.render_check(sample)
    first = text[: text.index("<svg")]
    assert "After models/tiny" in first and "After out/old, of last.json" in first
    assert "31 after 30, difference 1 (0.5 to 1.5)" in first


def hostile(value, told=HOSTILE):
    """The sample with everything that a file or a model decides replaced."""
    if isinstance(value, dict):
        kept = ("metric", "phase", "kind", "figure", "outcome", "verdict", "format", "rounding", "residual")
        return {key: item if key in kept else hostile(item, told) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item, told) for item in value]
    return told if isinstance(value, str) and value != "all" else value


@pytest.mark.parametrize("which", ["report", "check"])
def test_no_name_or_text_becomes_markup(which):
    sample, plain = hostile(getattr(report_samples, which)()), hostile(getattr(report_samples, which)(), "plain")
    texts = [report_page.render(one, [], None, HOSTILE if one is sample else "plain") if which == "report"
             else report_page.render_check(one) for one in (sample, plain)]  # fmt: skip
    assert Page(texts[0]).tags == Page(texts[1]).tags
    assert "<script>alert" not in texts[0] and "\u202e" not in texts[0] and "\x1b" not in texts[0]
    assert printable(HOSTILE, keep="\n") in html.unescape(texts[0])


class Counting(Pass[Strict]):
    """It saw 60 layers of 128 experts."""

    def apply(self, unit, context):
        return unit

    def coverage(self, details):
        return Coverage(0, loads={layer: range(1000, 1128) for layer in range(60)})


def test_a_large_model_s_report_stays_small():
    sample = report_samples.report()
    tensor = "model.layers.31.feed_forward.experts.127.down_proj.weight"
    sample["audit"] = [sample["audit"][0] | {"tensor": tensor}] * 50_000
    sample["layer_audit"] = sample["layer_audit"][:1] * 50_000
    sample["worst_prompts"] = [report_samples.worst("onnx", n) | {"text": "word " * 10_000} for n in range(30)]
    health = sample["state_health"][0]
    sample["state_health"] = [health | {"layer": n, "position": 1 << p} for n in range(1000) for p in range(6, 14)]
    sample |= {key: sample[key] * 50 for key in ("by_position", "recall", "flips", "generated", "tasks", "checks")}
    cell = heat.cell(
        "8.51", 0.5, heat.BLUES, "layer.31, experts: int8-g32 (384); 8.51 bits per weight, 123,456,789 bytes"
    )
    shown = heat.Heat("Bits", [str(n) for n in range(80)], [heat.Row(f"role {n}", [cell] * 80) for n in range(17)])
    done = [PassDone("count", Counting(Strict()), 1.0, 1, {}, (), 0)]
    text = report_page.render(sample, done, shown, "a: 1\n" * 200)
    assert len(text.encode()) < 2_000_000
    assert "The other 49,600 rows are in the JSON." in text and "Experts in calibration" in text


def test_apply_and_check_write_it(compress_cli, applied, small, tmp_path):
    text = (applied / "report.html").read_text()
    assert "report.html" in read_json(applied / "manifest.json")["files"]
    assert len(text.encode()) < 2_000_000
    page = Page(text)
    assert_needs_nothing_else(page, text)
    assert "ssm_in" in page.texts and "Bits per weight" in text and "method: rtn" in text
    arguments = ("check", small, small, "--prompts", "self", "--samples", 2, "--length", 12)
    result = compress_cli(*arguments, "--html", tmp_path / "check.html")
    assert result.exit_code == 0, result.output
    assert "Divergence by position" in (tmp_path / "check.html").read_text()
    refused = compress_cli(*arguments, "--html", tmp_path / "no" / "check.html")
    assert refused.exit_code == 2 and "--html" in refused.stderr


def test_the_strip_has_the_bits_of_every_role_in_every_layer(applied):
    model = Checkpoint(applied / "checkpoint", allow_quantized=True).model
    found = strip.strip(model.architecture, model.units)
    assert found.columns == ["emb", *map(str, range(8)), "head"]
    assert found.above == ["", "M+F", "M+E", "A+F", "M+E", "M+F", "M+E", "A+F", "M+E", ""]
    by_role = {row.label: row.cells for row in found.rows}
    manifest = read_json(applied / "manifest.json")["tensors"]["checkpoint"]
    assert manifest["model.layers.1.mamba.in_proj.weight"] == "int8" and "int8" in by_role["ssm_in"][2].words
    columns = model.architecture.config.hidden_size
    assert float(by_role["ssm_in"][2].text) == pytest.approx(8 + 32 / columns, abs=0.05), "a float32 scale for each row"
    assert by_role["ssm_a"][2].text == "16" and by_role["ssm_in"][3].text == "", "attention has none"
    assert by_role["experts"][2].words.startswith("layer.1, experts: int8 (24)")


# --- plots


def test_points_stand_where_their_values_are():
    x, y = charts.Axis("x", scales.linear([0, 10])), charts.Axis("y", scales.linear([0, 4], from_zero=True))
    points = [charts.Point(0, 0, "a"), charts.Point(5, 1, "b", 0.5, 2), charts.Point(10, 4, "c")]
    found = charts.plot("t", x, y, [charts.Series("s", points, 0)], [(2, "limit 2")])
    (curve,) = found.curves
    wide, high = 360 - charts.LEFT - charts.RIGHT, 230 - charts.TOP - charts.BOTTOM
    for dot, (right, up) in zip(curve.dots, [(0, 0), (0.5, 0.25), (1, 1)], strict=True):
        assert dot.x == pytest.approx(charts.LEFT + right * wide, abs=0.1)
        assert dot.y == pytest.approx(charts.TOP + (1 - up) * high, abs=0.1)
    assert found.limits[0].place == pytest.approx(charts.TOP + high / 2, abs=0.1)
    assert [tick.label for tick in found.y_ticks] == ["0", "1", "2", "3", "4"]
    assert "b" in found.summary and "limit" not in curve.name


@pytest.mark.parametrize("values", [[0.0], [0.003], [1, 1], [-2, 3], [1e-9, 2e-9], [0.99, 1.01], [5e8, 6e9], []])
@pytest.mark.parametrize("from_zero", [True, False])
def test_a_scale_holds_all_its_values_and_has_a_few_ticks(values, from_zero):
    scale = scales.linear(values, from_zero=from_zero)
    assert all(-1e-9 <= scale.place(value) <= 1 + 1e-9 for value in [*values, *(tick for tick, _ in scale.ticks)])
    assert 2 <= len(scale.ticks) <= 8
    assert len({label for _, label in scale.ticks}) == len(scale.ticks)


def test_bytes_have_ticks_at_powers_of_two():
    scale = scales.logarithmic([300_000, 70_000_000], scales.bytes_words, base=4.0)
    assert [label for _, label in scale.ticks] == ["256 KiB", "1 MiB", "4 MiB", "16 MiB", "64 MiB", "256 MiB"]


def test_a_long_context_has_labels_that_can_be_read():
    ends = [0, 64, *(256 << n for n in range(12))]
    rows = [report_samples.position("onnx", "decode", first, last - 1) for first, last in itertools.pairwise(ends)]
    found = plots.divergence_by_position(rows)
    assert len(found.curves[0].dots) == 13
    assert [tick.label for tick in found.x_ticks] == ["0", "256", "1K", "4K", "16K", "64K", "256K"]


def test_states_are_drawn_once_where_they_stay_as_they_were():
    sample = report_samples.report()
    assert [curve.name for curve in plots.state_memory(sample).curves] == ["original", "compressed"]
    sample["state_memory"]["candidate"] = sample["state_memory"]["baseline"]
    assert [curve.name for curve in plots.state_memory(sample).curves] == ["original and compressed"]


def test_the_size_plot_has_the_worse_phase_the_limit_and_the_original():
    sample = report_samples.report()
    for row in sample["checks"]:
        if (row["artifact"], row["phase"], row["metric"]) == ("onnx", "decode", "kl_divergence_mean"):
            row["value"] = 0.0055
    found = plots.size_against_quality(sample)
    words = {curve.name: curve.dots[0].words for curve in found.curves}
    assert words == {
        "original": "16.03 bits, 0 nats",
        "checkpoint": "6.24 bits, 0.0031 nats (prefill)",
        "onnx": "5.82 bits, 0.0055 nats (decode)",
    }
    assert [limit.label for limit in found.limits] == ["limit 0.006"]


def test_figures_that_are_not_finite_are_left_out_of_plots():
    sample = report_samples.report()
    for row in (*sample["checks"], *sample["by_position"]):
        row |= {"value": None} if "value" in row else {"kl_divergence_mean": None, "low": None, "high": None}
    assert plots.size_against_quality(sample) is None
    assert plots.divergence_by_position(sample["by_position"]) is None
    assert "not finite" in page_of(sample)[0]


def test_experts_that_no_token_reached_are_seen():
    text, _ = page_of(report_samples.report())
    assert "Experts in calibration" not in text
    (found,) = plots.expert_loads(Coverage(0, loads={3: (10, 0, 5)}))
    assert [height for height, _ in found.heights] == [1, 0, 0.5]
    assert found.heights[1][1] == "expert 1: 0 tokens"


def test_trials_have_a_cell_each_and_the_chosen_one_is_marked():
    found = plots.trials([Trial("layer 0, ssm_state", "int8", 1e-5, False), Trial("layer 0, ssm_state", "int4", 3e-4, True),
                          Trial("layer 2, kv_cache", "int8", None, False)])  # fmt: skip
    assert found.columns == ["int8", "int4"]
    assert [[cell.text for cell in row.cells] for row in found.rows] == [["1.0e-5", "3.0e-4 ✓"], ["not finite", ""]]


# --- colours


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_text_can_be_read_in_both_schemes():
    css = (pages.FOLDER / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    )
    assert light.keys() == dark.keys()
    for scheme in (light, dark):
        inks = ["fg", "muted", "good", "bad", "warn", *(f"c{n}" for n in range(1, charts.COLOURS + 1))]
        pairs = [
            *itertools.product(inks, ("bg", "panel")),
            *((word, f"{word}-bg") for word in ("good", "bad", "warn")),
            ("fg", "warn-bg"),
        ]
        for ink, ground in pairs:
            assert contrast(scheme[ink], scheme[ground]) >= 4.5, (ink, ground)


@pytest.mark.parametrize("stops", [heat.YELLOW_RED, heat.BLUES, heat.RED_BLUE])
def test_figures_can_be_read_on_every_colour_of_a_map(stops):
    for step in range(101):
        cell = heat.cell("1", step / 100, stops)
        assert contrast(cell.colour, cell.ink) >= 4.5
    assert heat.cell("", 0, stops).colour == stops[0] and heat.cell("", 1, stops).colour == stops[-1]


def test_a_picture_holds_a_dot_for_each_value():
    import base64

    shares = [[0.0, 0.5, 1.0], [1.0, 0.25, 0.0]]
    data = base64.b64decode(picture.of(shares, heat.RED_BLUE).removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + body) == struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0]
        chunks[kind], at = body, at + 12 + size
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (3, 2)
    rows = zlib.decompress(chunks[b"IDAT"])
    dots = [[rows[1 + 10 * y + 3 * x :][:3].hex() for x in range(3)] for y in range(2)]
    assert dots[0] == [stop.removeprefix("#") for stop in heat.RED_BLUE[::2]] and dots[1][0] == dots[0][2]
