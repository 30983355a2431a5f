"""The report in a real browser. Without a Chromium binary these tests are skipped and say so."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import findings_samples as samples
import training_samples
from rightbatch.report.html import render_html
from rightbatch.report.training import render_training_html

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--virtual-time-budget=8000", "--hide-scrollbars",
         "--allow-file-access-from-files")  # fmt: skip
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium binary on the PATH")]

PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const told = {width: document.documentElement.scrollWidth, drawn: document.querySelectorAll(".main-svg").length,
                requests: performance.getEntriesByType("resource").map(entry => entry.name), alerts: window.alerts || 0,
                blocked: window.blocked || 0, page: getComputedStyle(document.body).backgroundColor};
  document.title = "TOLD" + JSON.stringify(told) + "DLOT";
}, 1000));
</script>"""
WATCH = """<script>window.alerts = 0; window.alert = () => { window.alerts += 1; };
window.blocked = 0; document.addEventListener("securitypolicyviolation", () => { window.blocked += 1; });</script>"""


def dump(page: Path, tmp_path: Path, suffix: str = "", width: int = 1000) -> str:
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
        "--dump-dom",
        page.as_uri() + suffix,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def watched(text: str) -> str:
    """Return a page with a probe in it and without its policy, so that the escaping alone is what is tested."""
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    return without_policy.replace("<head>", "<head>" + WATCH).replace("</body>", PROBE + "</body>")


def told(dom: str) -> str:
    match = re.search(r"TOLD(.*?)DLOT", dom)
    assert match is not None, dom[:2000]
    return html.unescape(match[1])


def write(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "report.html"
    page.write_text(text, encoding="utf-8")
    return page


def test_hostile_names_run_no_script_and_no_request_leaves(tmp_path: Path) -> None:
    page = write(tmp_path, watched(render_html(samples.hostile_names())))

    report = told(dump(page, tmp_path))

    assert '"alerts":0' in report
    assert '"requests":[]' in report


def test_the_watch_sees_a_script_that_does_run(tmp_path: Path) -> None:
    page = write(tmp_path, watched(render_html(samples.good())).replace("<main>", "<main><script>alert(1)</script>"))

    assert '"alerts":1' in told(dump(page, tmp_path))


def test_all_charts_are_drawn_under_the_policy(tmp_path: Path) -> None:
    dom = dump(write(tmp_path, render_html(samples.good())), tmp_path)

    assert 'data-drawn="5"' in dom


def test_the_charts_of_a_training_are_drawn_and_hostile_names_run_nothing(tmp_path: Path) -> None:
    dom = dump(write(tmp_path, render_training_html(*training_samples.good())), tmp_path)
    report = told(dump(write(tmp_path, watched(render_training_html(*training_samples.hostile_names()))), tmp_path))

    assert 'data-drawn="6"' in dom
    assert '"alerts":0' in report
    assert '"requests":[]' in report


def test_the_report_of_a_training_fits_a_phone(tmp_path: Path) -> None:
    assert width_on_a_phone(render_training_html(*training_samples.good()), tmp_path) == "360"


def test_the_policy_stops_a_script_that_is_not_the_pages_own(tmp_path: Path) -> None:
    foreign = "<script>document.documentElement.dataset.foreign = 'ran'</script>"
    text = render_html(samples.memory_only()).replace("<main>", "<main>" + foreign)

    with_policy = dump(write(tmp_path, text), tmp_path)
    without = dump(write(tmp_path, watched(text)), tmp_path)

    assert 'data-foreign="ran"' not in with_policy
    assert 'data-foreign="ran"' in without


def width_on_a_phone(text: str, tmp_path: Path) -> str:
    page = write(tmp_path, text)
    frame = tmp_path / "phone.html"
    frame.write_text(
        f'<iframe src="{page.name}" style="width:360px;height:800px;border:0"></iframe><script>'
        'const inside = () => document.querySelector("iframe").contentWindow.document.documentElement;'
        'addEventListener("load", () => setTimeout(() => { document.title = "TOLD" + inside().scrollWidth + "DLOT"; }, 1500));</script>',
        encoding="utf-8",
    )
    return told(dump(frame, tmp_path))


@pytest.mark.parametrize("name", ["good", "inconclusive", "nothing_fits", "hostile_names"])
def test_a_phone_of_360_pixels_needs_no_sideways_scrolling(tmp_path: Path, name: str) -> None:
    assert width_on_a_phone(render_html(samples.ALL[name]()), tmp_path) == "360"


def test_a_page_too_wide_for_a_phone_would_be_seen(tmp_path: Path) -> None:
    wide = render_html(samples.memory_only()).replace("<main>", '<main><div style="width:500px">wide</div>')

    assert int(width_on_a_phone(wide, tmp_path)) > 360


@pytest.mark.parametrize(("suffix", "colour"), [("#light", "rgb(255, 255, 255)"), ("#dark", "rgb(20, 23, 28)")])
def test_the_address_can_ask_for_light_or_dark(tmp_path: Path, suffix: str, colour: str) -> None:
    page = write(tmp_path, watched(render_html(samples.memory_only())))

    assert colour in told(dump(page, tmp_path, suffix))
