import json
import re
import subprocess
import sys
import types
from html.parser import HTMLParser

import pytest
import rich.console
from plotly.offline import get_plotlyjs

import findings_samples as samples
from golden_files import golden
from rightbatch.report import charts
from rightbatch.report.html import _breakable, render_html, render_notebook
from rightbatch.report.text import render_text

NAMES = sorted(samples.ALL)


def text_of(name: str) -> str:
    return render_text(samples.ALL[name](), width=80, colour=False)


def page_of(name: str) -> str:
    return render_html(samples.ALL[name]()).replace(get_plotlyjs(), "PLOTLY_JS")


@pytest.mark.parametrize("name", NAMES)
def test_text_is_the_stored_text(name: str) -> None:
    golden(f"report_{name}.txt", text_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_page_is_the_stored_page(name: str) -> None:
    golden(f"report_{name}.html", re.sub(r"sha256-[A-Za-z0-9+/=]+", "sha256-DIGEST", page_of(name)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_line_is_longer_than_the_terminal(name: str, width: int) -> None:
    lines = render_text(samples.ALL[name](), width=width, colour=False).splitlines()

    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_line_is_broken_between_a_number_and_its_unit(name: str, width: int) -> None:
    text = render_text(samples.ALL[name](), width=width, colour=False)

    assert not re.search(r"\d\n\s*(%|(B|KiB|MiB|GiB|us|ms|s|min|h)\b)", text)


def test_a_page_holds_numbers_and_units_together() -> None:
    assert "5\N{NO-BREAK SPACE}%" in page_of("good")


def test_the_reasons_of_unsteady_timings_are_said_once() -> None:
    for report in (text_of("unstable"), page_of("unstable")):
        assert report.count("Other processes keep 6.2 of 8 cores busy.") == 1


@pytest.mark.parametrize("name", NAMES)
def test_text_without_colour_has_no_control_characters(name: str) -> None:
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", text_of(name))


def test_colour_changes_nothing_but_colour() -> None:
    coloured = render_text(samples.good(), width=80, colour=True)

    plain = "\n".join(line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()).rstrip() + "\n"

    assert "\x1b[" in coloured
    assert plain == text_of("good")


def test_markup_in_names_is_printed_not_obeyed() -> None:
    assert "[red]x[/red]" in text_of("hostile_names")


class Outline(HTMLParser):
    """Collects a page's tags, the addresses it names, and the scripts that would run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.executable = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.addresses += [given[name] or "" for name in ("src", "href", "action", "data") if name in given]
        self.handlers += [name for name in given if name.startswith("on")]
        self.executable += tag == "script" and given.get("type") != "application/json"


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    return parser


@pytest.mark.parametrize("name", NAMES)
def test_the_page_names_no_address_and_runs_only_its_own_scripts(name: str) -> None:
    seen = outline(page_of(name))

    assert not seen.addresses
    assert not seen.handlers
    assert seen.executable == (2 if "plot" in page_of(name).split("</main>")[0] else 1)
    assert not {"img", "iframe", "object", "link"} & set(seen.tags)


def test_hostile_names_add_no_tag() -> None:
    assert outline(page_of("hostile_names")).tags.count("script") == outline(page_of("good")).tags.count("script")
    assert samples.HOSTILE_NAME not in page_of("hostile_names")


def test_hostile_names_add_no_tag_to_a_notebook() -> None:
    fragment = render_notebook(samples.hostile_names())

    assert outline(fragment).executable == 0
    assert "<script" not in fragment


def test_plotly_is_inlined_once_and_only_for_charts() -> None:
    assert render_html(samples.good()).count(get_plotlyjs()) == 1
    bare = samples.memory_only().model_copy(update={"memory": None})
    assert get_plotlyjs() not in render_html(bare)


def test_every_chart_has_a_description_and_its_numbers_in_a_table() -> None:
    page = page_of("good")

    assert len(re.findall(r'class="plot" role="img" aria-label="[^"]{40,}"', page)) == 5
    assert page.count("<details><summary>The numbers behind") == 4


def test_figures_are_json_without_a_way_out_of_their_element() -> None:
    block = re.search(r'type="application/json">(.*?)</script>', page_of("hostile_names"), re.DOTALL)

    assert block is not None
    assert "<" not in block[1]
    assert len(json.loads(block[1])) == 5


def test_the_notebook_view_is_small_and_has_the_answer() -> None:
    fragment = render_notebook(samples.good())

    assert len(fragment) < 6000
    assert "batch 512 = micro 128 x accumulate 4" in fragment


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", [charts.BLUE, charts.ORANGE, charts.GREEN, charts.GREY])
@pytest.mark.parametrize("page", [charts.LIGHT_PAGE, charts.DARK_PAGE])
def test_chart_colours_stand_out_on_both_pages(colour: str, page: str) -> None:
    darker, lighter = sorted((luminance(colour), luminance(page)))

    assert (lighter + 0.05) / (darker + 0.05) >= 3


def test_the_throughput_chart_shows_intervals_knee_and_loader() -> None:
    figure = charts.speed_chart(samples.step_time(), samples.loader())

    measured = next(trace for trace in figure.data if trace.error_y.array is not None)
    assert len(measured.error_y.array) == len(samples.step_time().points)
    assert {note.text for note in figure.layout.annotations} == {"data loader", "knee 128"}


def test_the_cost_chart_marks_the_choice_and_shades_the_set() -> None:
    figure = charts.cost_chart(samples.tradeoff(), 512, (256, 512))

    shaded = next(shape for shape in figure.layout.shapes if shape.type == "rect")
    assert shaded.x0 < 256 < 512 < shaded.x1
    assert "choice 512" in {note.text for note in figure.layout.annotations}


def test_the_memory_chart_shows_limit_and_ceiling() -> None:
    figure = charts.memory_chart(samples.memory())

    assert {note.text for note in figure.layout.annotations} == {"limit", "ceiling 1640"}
    assert {trace.name for trace in figure.data} == {"calibrated trace", "ran", "over the limit"}


BLOCKER = """
import sys
import types
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch was imported")
sys.meta_path.insert(0, Blocker())
"""


def run_without_torch(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKER + code], capture_output=True, text=True, check=False)


def test_the_report_never_imports_torch() -> None:
    done = run_without_torch("import rightbatch.report.html, rightbatch.report.text")

    assert done.returncode == 0, done.stderr


def test_the_torch_blocker_can_fail() -> None:
    done = run_without_torch("import torch")

    assert done.returncode != 0
    assert "torch was imported" in done.stderr


def test_a_note_at_the_top_of_a_chart_is_crossed_by_no_line() -> None:
    curve = samples.good().memory
    far = curve.model_copy(update={"limit": curve.limit.model_copy(update={"limit_bytes": 1 << 50})})

    tops = [max(shape.y1 for shape in charts.memory_chart(each).layout.shapes if shape.x0 == shape.x1) for each in (curve, far)]

    assert tops[0] == 1
    assert tops[1] < 0.9


def test_a_long_name_in_a_table_can_break_and_a_number_cannot() -> None:
    assert str(_breakable("aten.max_pool2d")) == "aten.max_<wbr>pool2d"
    assert str(_breakable("0.0746 <b>")) == "0.0746 &lt;b&gt;"


def test_text_in_a_notebook_is_returned_and_not_shown_beside_that(monkeypatch) -> None:
    shown = []
    display = types.ModuleType("IPython.display")
    display.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)

    assert render_text(samples.good(), width=80, colour=False).startswith("batch ")
    assert shown == []
