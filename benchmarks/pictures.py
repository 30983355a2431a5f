"""Draw the pictures of the documentation from a real run: the terminal's answer, and the page in light, in dark and on a phone.

Usage: python benchmarks/pictures.py RUN/findings.json [--out docs/images] [--chromium PATH]
"""

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from rightbatch.records.plan import Findings
from rightbatch.report.html import render_html
from rightbatch.report.text import build

PICTURES = {"report-light.png": ("#light", 1100, 1900), "report-dark.png": ("#dark", 1100, 1900), "report-phone.png": ("#light", 390, 1900)}
"""File name: (theme, width, height), in pixels."""
LARGEST_BYTES = 300 * 2**10
SMALLEST_WINDOW_PX = 500
"""Chromium opens no narrower window; a narrower page is drawn in a frame and cut."""


def main() -> int:
    """Read the findings and draw every picture; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("findings", type=Path, help="findings.json of a run")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for the pictures (default: %(default)s)")
    parser.add_argument("--chromium", default=None, help="browser to draw the page with; without one, only the terminal is drawn")
    arguments = parser.parse_args()
    findings = _read(arguments.findings)
    arguments.out.mkdir(parents=True, exist_ok=True)
    _draw_terminal(findings, arguments.out / "terminal.svg")
    browser = arguments.chromium or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        print("terminal.svg is drawn; the page needs Chromium: install it, or name it with --chromium PATH.", file=sys.stderr)
        return 1
    for name, (theme, width, height) in PICTURES.items():
        _draw_page(browser, render_html(findings), theme, width, height, arguments.out / name)
    return _too_large(arguments.out)


def _read(path: Path) -> Findings:
    """Read findings, whether the file is the document itself or wraps it under ``findings``, as a run folder does."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return Findings.model_validate(document.get("findings", document))


def _draw_terminal(findings: Findings, target: Path) -> None:
    console = Console(
        record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False, markup=False, emoji=False
    )
    console.print(build(findings))
    drawing = console.export_svg(title="rightbatch find", unique_id="terminal")
    # The drawing must load nothing: the fonts it would fetch are left out, and the reader's own monospace font is used.
    target.write_text(re.sub(r"@font-face\s*\{.*?\}", "", drawing, flags=re.DOTALL), encoding="utf-8")


def _draw_page(browser: str, page: str, theme: str, width: int, height: int, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.html")
        report.write_text(page, encoding="utf-8")
        address = report.as_uri() + theme
        if width < SMALLEST_WINDOW_PX:
            frame = Path(folder, "frame.html")
            frame.write_text(
                f'<body style="margin:0;background:#e2e5ea"><iframe src="report.html{theme}" style="display:block;margin:0 auto;border:0;'
                f'width:{width}px;height:{height}px"></iframe></body>',
                encoding="utf-8",
            )
            address, width = frame.as_uri(), SMALLEST_WINDOW_PX
        command = (
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--virtual-time-budget=8000",
            "--force-device-scale-factor=1",
            f"--user-data-dir={folder}/profile",
            f"--window-size={width},{height}",
            f"--screenshot={target.resolve()}",
            address,
        )
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def _too_large(folder: Path) -> int:
    large = [name for name in PICTURES if (folder / name).stat().st_size > LARGEST_BYTES]
    for name in large:
        print(f"{name} is larger than {LARGEST_BYTES // 2**10} KiB: draw less of the page.", file=sys.stderr)
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main())
