"""The page in a real browser: it opens in silence, sorts, shows every chart, and fits a phone, in light and in dark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from halobench.records import RunRecord
from halobench.reports.figures import figures, training_lines
from halobench.reports.leaderboard import make_board
from halobench.reports.page import page as html_page
from halobench.reports.palette import DARK, LIGHT, STEPS
from halobench.reports.plots import plots_of
from halobench.reports.scene import Text
from tests.browser import CHROMIUM, MISSING, Browser
from tests.test_reports import EVEN, HALO, TEACHER, card, evaluated, hits, needle, plain, record, selection
from tests.test_reports_input import hostile_study

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)


LONG_NAME = "third_hybrid_whose_name_nobody_broke_anywhere"


def full_study() -> list[RunRecord]:
    """Everything a page can show; the third hybrid lacks much of it, but has a name without a space in it."""
    made = []
    third = card("third", [1, 4], (LONG_NAME,))
    for place, (model, counts) in enumerate(((TEACHER, (26, 12, 1)), (HALO, (24, 23, 22)), (EVEN, (20, 15, 14)))):
        depths = [i / 12 for i in range(13)] * 2
        needles = [
            replace(needle(length, hits(count, 26)), depths=depths, clusters=[i % 13 for i in range(26)])
            for length, count in zip((512, 1024, 2048), counts, strict=True)
        ]
        needles += [plain("niah", "multikey-4", "answer_logprob", -1.0 - place, 0.1, length=n) for n in (512, 1024)]
        ruler = [plain("ruler", "vt", "score", 0.9 - n / 9000, 0.03, length=n) for n in (512, 1024)]
        commonsense = [plain("csr", "piqa", "acc_norm", 0.7 - 0.01 * place, 0.02)]
        speed = [plain("profile", "tpot_ms", "median", 9.5 + place, 0.2, length=n) for n in (512, 8192)]
        speed += [plain("profile", "cache_bytes", "value", 2.0**20 * n / (8 + place), length=n) for n in (512, 8192)]
        made += [record(model, [*needles, *ruler, *commonsense]), record(model, speed, kind="profile")]
    points = [[1000 * i, 2 + 1 / i] for i in range(1, 50)]
    stages = [{"stage": "distil", "tokens": 1000, "seconds": 60, "first_loss": 3.0, "last_loss": 2.0}]
    details = {"stages": stages, "curves": {"distil": points}, "scale": {"50": 2.1, "100": 2.0}}
    settings = {"data": "x" * 300}
    converted = record(HALO, kind="convert", details=details, settings=settings)
    return [*made, evaluated(third, (100,)), selection(), converted]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    path = folder / "report.html"
    path.write_text(html_page(make_board(full_study())), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


def test_the_page_is_one_file_that_names_no_other(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not re.search(r"https?://|url\(|@import|\bsrc=|<link(?! rel=\"icon\" href=\"data:,\")", text)
    assert "default-src 'none'" in text and len(text) < 1_000_000


@needs_chromium
def test_the_page_opens_in_silence_and_loads_nothing(page: Path, browser: Browser) -> None:
    browser.open(page)
    assert browser.said == []
    assert [url for url in browser.asked if not url.startswith("data:")] == [page.resolve().as_uri()]
    titles = browser.run("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert titles == [
        "What the numbers say", "Leaderboard", "Quality against speed and memory", "Over context length",
        "Where needles are found", "Which layers stay softmax", "Training", "Notes", "Environment and lineage",
    ]  # fmt: skip
    broken = "[...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.hash)).length"
    assert browser.run(broken) == 0


COLUMN = """(title) => {
  const table = document.querySelector('table.sortable');
  const place = [...table.tHead.rows[0].cells].findIndex(c => c.textContent.startsWith(title));
  return [...table.tBodies[0].rows].map(row => row.cells[place].textContent);
}"""
HEAD = "[...document.querySelectorAll('thead th')].find(c => c.textContent.startsWith({!r}))"


@needs_chromium
def test_tables_sort_both_ways_and_keep_what_is_missing_at_the_end(page: Path, browser: Browser) -> None:
    browser.open(page)
    title = "TPOT ms"
    head = HEAD.format(title)
    for order, expected in (("ascending", ["9.50", "10.5", "11.5"]), ("descending", ["11.5", "10.5", "9.50"])):
        browser.run(f"{head}.querySelector('button').click()")
        cells = browser.run(f"({COLUMN})({title!r})")
        assert [cell.split(" / ")[0] for cell in cells] == [*expected, "–"], "as numbers, not as text"
        assert browser.run(f"{head}.getAttribute('aria-sort')") == order
    names = HEAD.format("selection")
    browser.run(f"{names}.querySelector('button').focus()")
    browser.press("Enter")
    shown = browser.run(f"({COLUMN})('selection')")
    assert shown == sorted(shown, key=str.casefold) and len(shown) == 4
    browser.press(" ")
    assert browser.run(f"({COLUMN})('selection')") == shown[::-1]
    assert browser.run("document.querySelectorAll('th[aria-sort]').length") == 1
    assert browser.run("document.getElementById('said').textContent") == "Sorted by selection, descending"
    browser.run(HEAD.format("needles 512") + ".querySelector('button').click()")
    assert browser.run(f"({COLUMN})('needles 512')")[0].startswith("1.000"), "the first click puts the best first"


@needs_chromium
def test_every_chart_is_drawn_and_named(page: Path, browser: Browser) -> None:
    browser.open(page)
    marks_of = "[...s.querySelectorAll('.mark')].map(m => m.getBBox()).filter(b => b.width + b.height > 0).length"
    listed = f"[...document.querySelectorAll('svg.chart')].map(s => [s.getAttribute('aria-label'), {marks_of}])"
    charts = browser.run(listed)
    assert len(charts) == 4 + 5 + 3 + 1 + 3 + 2, "trade-offs, curves, maps, selectors, training"
    assert all(label and marks for label, marks in charts), charts
    assert [marks for label, marks in charts if " against " in label] == [3] * 4, "a point a model that has both"
    maps = {label: marks for label, marks in charts if "by depth" in label}
    assert set(maps.values()) == {13 * 3}
    outside = """[...document.querySelectorAll('svg.chart')].filter(s => [...s.children].some(m => {
      const b = m.getBBox(), v = s.viewBox.baseVal;
      return b.x < -6 || b.y < -2 || b.x + b.width > v.width + 8 || b.y + b.height > v.height + 2;
    })).map(s => s.getAttribute('aria-label'))"""
    assert browser.run(outside) == [], "nothing leaves its drawing"


@needs_chromium
@pytest.mark.parametrize("width", [320, 360])
def test_a_phone_needs_no_sideways_scrolling(page: Path, browser: Browser, width: int) -> None:
    browser.open(page, width=width, height=740, dark=width == 360)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run("document.querySelector('.scroll').scrollWidth > 360"), "the wide table scrolls in its own box"
    boxes = "[...document.querySelectorAll('figure, pre')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert browser.run(boxes) == 0, "what scrolls can be reached by keyboard; these cannot"
    wide = f"[...document.querySelectorAll('li')].filter(e => e.getBoundingClientRect().right > {width}).length"
    assert browser.run(wide) == 0
    smallest = (
        "Math.min(...[...document.querySelectorAll('svg.chart text')].map(t => t.getBoundingClientRect().height))"
    )
    assert browser.run(smallest) >= (9 if width == 360 else 8)


CONTRAST = """(() => {
  const part = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const numbers = s => s.match(/[\\d.]+/g).map(Number);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = numbers(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    throw new Error('no ground');
  };
  let least = 99;
  const texts = 'h1,h2,h3,p,li,a,th,td,button,caption,dt,dd,summary,span,pre,svg text';
  for (const e of document.querySelectorAll(texts)) {
    const style = getComputedStyle(e);
    if (e.classList.contains('skip') || !e.textContent) continue;
    const cell = /^var\\(--t\\d\\)$/.test(e.getAttribute('fill') || '') && e.previousElementSibling;
    const on = cell ? numbers(getComputedStyle(cell).fill) : ground(e);
    const [a, b] = [light(numbers(e.matches('text') ? style.fill : style.color)), light(on)];
    least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return least;
})()"""


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_every_text_stands_out(page: Path, browser: Browser, dark: bool) -> None:
    browser.open(page, dark=dark)
    wanted = DARK if dark else LIGHT
    paper = "rgb({}, {}, {})".format(*(int(wanted["paper"][i : i + 2], 16) for i in (1, 3, 5)))
    assert browser.run("getComputedStyle(document.body).backgroundColor") == paper
    assert browser.run(CONTRAST) >= 4.5


def test_the_map_takes_the_grid_of_exact_depths_where_there_is_one() -> None:
    grid = replace(needle(4096, [1.0, 0.0, 0.0]), suite="grid", task="needle", depths=[0.0, 0.5, 0.5])
    (drawn,) = figures(make_board([evaluated(TEACHER, (100, 40), grid)]).groups[0]).heat
    shown = [part.text for part in drawn.parts if isinstance(part, Text)]
    assert {"4K", "0%", "50%", "100", "0"} <= set(shown) and "512" not in shown


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_series_stand_out_and_heat_grows_in_steps(colours: dict[str, str]) -> None:
    def contrast(a: str, b: str) -> float:
        x, y = sorted((luminance(colours[a]), luminance(colours[b])))
        return (y + 0.05) / (x + 0.05)

    drawn = [name for name in colours if re.fullmatch(r"s\d|kept|rest", name)]
    assert len(drawn) == 8 and all(contrast(name, "paper") >= 3 for name in drawn)
    assert all(contrast(f"t{i}", f"h{i}") >= 4.5 for i in range(STEPS))
    distance = [contrast(f"h{i}", "paper") for i in range(STEPS)]
    assert distance == sorted(distance), "more is further from the paper"


@pytest.fixture(scope="module")
def drawn_alone() -> str:
    (found,) = [plot.svg for plot in plots_of(make_board(full_study())) if plot.stem == "needles"]
    return found


def test_a_drawing_in_a_file_has_its_colours_without_any_style(drawn_alone: str) -> None:
    bare = re.sub(r"<style>.*?</style>", "", drawn_alone)
    assert "var(" not in drawn_alone and f'fill="{LIGHT["s0"]}"' in bare and f'stroke="{LIGHT["s1"]}"' in bare


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_drawing_in_a_file_follows_light_and_dark(
    drawn_alone: str, browser: Browser, tmp_path: Path, dark: bool
) -> None:
    (tmp_path / "x.svg").write_text(drawn_alone, encoding="utf-8")
    browser.open(tmp_path / "x.svg", dark=dark)
    for place, role in (("rect", "paper"), ("text", "ink"), ("path.mark.fill-s0", "s0")):
        colour = (DARK if dark else LIGHT)[role]
        shown = "rgb({}, {}, {})".format(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)))
        assert browser.run(f"getComputedStyle(document.querySelector('{place}')).fill") == shown


def test_what_charts_of_layers_and_training_show_is_told_in_numbers(page: Path) -> None:
    text = page.read_text("utf-8")
    scores = text.split("<summary>Scores by layer</summary>")[1].split("</details>")[0]
    assert '<td class="number" data-sort="0.97"><strong>0.970 ±0.020 kept</strong></td>' in scores
    assert '<td class="number" data-sort="24700.0"><strong>24700 kept</strong></td>' in scores
    losses = text.split("<summary>Losses as numbers</summary>")[1].split("</details>")[0]
    assert 'data-sort="49000.0"' in losses and ">2.0204<" in losses, "the last point is told"
    assert losses.count("<tr>") < 20, "a curve of 49 points is thinned"


def test_a_missing_text_is_sorted_as_missing(page: Path) -> None:
    text = page.read_text("utf-8")
    dash = '<span aria-label="not measured">'
    assert f'data-sort="">{dash}' in text and not re.search(f'data-sort="[^"]+">{dash}', text)


def test_lines_of_training_run_by_their_place_and_keep_their_end() -> None:
    details = {"scale": {"800": 2.1, "50": 2.2, "100": 2.0}, "curves": {"x": [[i, 1 / i] for i in range(1, 1000)]}}
    lines = training_lines((), [record(HALO, kind="convert", details=details)])
    assert [dot.x for dot in lines["scale search"][0][1]] == [50, 100, 800]
    curve = lines["x"][0][1]
    assert len(curve) <= 200 and curve[-1].x == 999


@needs_chromium
def test_the_keyboard_reaches_the_results_first(page: Path, browser: Browser) -> None:
    browser.open(page)
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "skip"
    assert browser.run("document.activeElement.getBoundingClientRect().top >= 0"), "it is seen when reached"
    browser.press("Enter")
    assert browser.run("document.activeElement.id") == "content"
    browser.run("document.querySelector('thead button').focus()")
    browser.press("Tab")
    assert browser.run("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2


@needs_chromium
def test_hostile_texts_do_nothing_in_a_browser(tmp_path: Path, browser: Browser) -> None:
    path = tmp_path / "report.html"
    path.write_text(html_page(make_board(hostile_study())), encoding="utf-8")
    browser.open(path)
    assert browser.said == [] and browser.run("document.querySelectorAll('img, main script, main em').length") == 0
    assert "<script>alert(1)</script>|`a`*b*_c_[l](javascript:1)" in browser.run("document.body.innerText")
    browser.run("document.querySelectorAll('thead button').forEach(b => b.click())")
    assert browser.said == []
