"""The pages in a browser, at the width of a phone and of a desktop, in light and dark: nothing hangs over the edge, nothing is
fetched, nothing complains, and the verdict is the first thing there is to see."""

from pathlib import Path

import browser
import pytest
import report_samples
from jamba_models import make_jamba

from compress.checkpoint.reader import Checkpoint
from compress.report.html import report_page, strip

pytestmark = pytest.mark.compilers

PHONE, DESKTOP = 390, 1280
PAGES = ("report", "long", "check", "sensitivity", "experts")
RECIPE = "version: 1\npasses: [{quantize: {weights: int8}}]\ncheck: {prompts: [self]}\n"
NO_WIDER = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
OPEN_ALL = "for (const one of document.querySelectorAll('details')) one.open = true"
# what sticks out of its box, other than within boxes that scroll
OUTSIDE = """[...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll, pre, svg') && one.checkVisibility())
    .filter(one => { const box = one.getBoundingClientRect(); return box.right > innerWidth + 1 || box.left < -1; })
    .map(one => one.outerHTML.slice(0, 200))"""
# labels of plots that the plot cuts off, or that stand on each other along an axis
CLIPPED = """[...document.querySelectorAll('main figure svg')].flatMap(svg => { const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text')].filter(one => { const box = one.getBoundingClientRect();
        return box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1; })
    .map(one => one.textContent); })"""
LETTERS = (
    "Math.min(...[...document.querySelectorAll('main figure svg text')].map(one => one.getBoundingClientRect().height))"
)


@pytest.fixture(scope="module")
def chromium(from_environment):
    with browser.running(str(from_environment("COMPRESS_CHROMIUM"))) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory, compress_cli) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    model = make_jamba(folder / "model", num_hidden_layers=4)
    (folder / "recipe.yaml").write_text(RECIPE)
    asked = ("--samples", 4, "--length", 32)
    formats = ("--format", "int8", "--format", "int4-g32", "--format", "fp8-e4m3")
    for arguments in (
        ("sensitivity", folder / "recipe.yaml", "-m", model, *asked, *formats, "--html", folder / "sensitivity.html"),
        ("experts", model, "--prompts", "self", *asked, "--html", folder / "experts.html"),
    ):
        result = compress_cli(*arguments)
        assert result.exit_code == 0, result.output
    opened = Checkpoint(model).model
    shown = strip.strip(opened.architecture, opened.units)
    (folder / "report.html").write_text(report_page.render(report_samples.report(), [], shown, "version: 1\n"))
    (folder / "long.html").write_text(report_page.render(long_names(), [], shown, "note: " + "word " * 500))
    (folder / "check.html").write_text(report_page.render_check(report_samples.check()))
    return {name: folder / f"{name}.html" for name in PAGES}


def long_names() -> dict:
    """A report with names that do not end, and with many rows."""
    sample, name = report_samples.report(), "x" * 300
    sample["model"]["name"] = name
    for row in (
        *sample["audit"],
        *sample["checks"],
        *sample["by_position"],
        *sample["worst_prompts"],
        *sample["artifacts"],
    ):
        row |= {key: name for key in ("tensor", "text", "baseline_text", "prompts", "path") if key in row}
    sample["remarks"] = [name]
    sample["audit"] *= 30
    return sample


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_fetches_nothing_and_does_not_complain(chromium, pages, name, width, dark):
    chromium.visit(pages[name], width=width, dark=dark)
    assert chromium.ask("innerWidth") == width
    assert chromium.ask(NO_WIDER)
    chromium.ask(OPEN_ALL)
    assert chromium.ask(NO_WIDER), "with all that is folded opened"
    assert chromium.ask(OUTSIDE) == []
    assert chromium.ask(CLIPPED) == []
    assert chromium.requests() == []
    assert chromium.complaints() == []
    light = (
        sum(map(int, chromium.ask("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(","))) > 384
    )
    assert light != dark


@pytest.mark.parametrize("name", PAGES)
def test_text_in_plots_can_be_read_on_a_phone(chromium, pages, name):
    chromium.visit(pages[name], width=PHONE)
    assert chromium.ask("document.querySelectorAll('main figure svg text').length === 0") or chromium.ask(LETTERS) >= 9


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", ["report", "check"])
def test_the_verdict_and_what_is_wrong_are_on_the_first_screen(chromium, pages, name, width):
    chromium.visit(pages[name], width=width, height=800)
    where = "document.querySelector('{}').getBoundingClientRect()"
    assert chromium.ask("document.querySelector('.verdict').textContent") == "fail"
    assert chromium.ask(f"{where.format('.verdict')}.bottom") < 200
    assert chromium.ask("document.querySelector('.failures').textContent.includes('experts.3.down_proj')")
    assert chromium.ask(f"{where.format('.failures li:nth-child(3)')}.bottom") < 800
    assert chromium.ask("parseFloat(getComputedStyle(document.querySelector('.verdict')).fontSize)") >= 20


@pytest.mark.parametrize("name", PAGES)
def test_without_scripts_everything_is_there(chromium, pages, name):
    text = "document.querySelector('main').textContent.replace(/\\s+/g, ' ')"
    chromium.visit(pages[name], width=DESKTOP, script=False)
    assert chromium.ask("document.querySelectorAll('input').length") == 0
    without = chromium.ask(text)
    assert chromium.ask(NO_WIDER)
    chromium.visit(pages[name], width=DESKTOP)
    assert without == chromium.ask(text)


def test_a_table_can_be_sorted_and_searched(chromium, pages):
    chromium.visit(pages["long"], width=DESKTOP)
    chromium.ask(OPEN_ALL)
    table = "[...document.querySelectorAll('details table.data')].find(one => one.tHead.textContent.includes('relative error'))"
    column = f"[...{table}.tBodies[0].rows].map(row => row.cells[3].textContent)"
    click = f"[...{table}.tHead.rows[0].cells][3].querySelector('button').click()"
    before = chromium.ask(column)
    chromium.ask(click)
    assert chromium.ask(column) == sorted(before, key=float)
    chromium.ask(click)
    assert chromium.ask(column) == sorted(before, key=float, reverse=True)
    assert chromium.ask(f"{table}.tHead.rows[0].cells[3].getAttribute('aria-sort')") == "descending"
    chromium.ask(f"""{{ const box = {table}.closest('details').querySelector('input'); box.value = 'int4-g32 FAILS';
        box.dispatchEvent(new Event('input')); }}""")
    shown = f"[...{table}.tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[2].textContent)"
    assert chromium.ask(shown) == ["int4-g32"] * 30
