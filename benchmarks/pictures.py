"""Draw the pictures of the documentation from real folders: the answer in a terminal, and the pages of a run, a training and a sweep.

Usage: python benchmarks/pictures.py RUN [--training FOLDER] [--sweep FOLDER] [--out docs/images] [--chromium PATH]
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from rightbatch.cli.stored import judge_again, read_sweep, read_training
from rightbatch.records.plan import Findings
from rightbatch.report.html import render_html
from rightbatch.report.sweep import render_sweep_html
from rightbatch.report.text import render_text
from rightbatch.report.training import render_training_html


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a page."""

    file: str
    of: Literal["run", "training", "sweep"]
    width: int
    """In pixels, as all lengths here."""
    height: int
    theme: Literal["light", "dark"] = "light"


PICTURES = (
    Picture(file="report-light.png", of="run", width=1100, height=1900),
    Picture(file="report-dark.png", of="run", width=1100, height=1900, theme="dark"),
    Picture(file="report-phone.png", of="run", width=390, height=1900),
    Picture(file="training.png", of="training", width=1100, height=1500),
    Picture(file="sweep.png", of="sweep", width=1100, height=1500),
)
LARGEST_BYTES = 300 * 2**10
SMALLEST_WINDOW_PX = 500
"""Chromium opens no narrower window; a narrower page is drawn in a frame and cut."""


def main() -> int:
    """Read the folders and draw every picture of them; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of `rightbatch find`")
    parser.add_argument("--training", type=Path, help="folder of a training; without one it is not drawn")
    parser.add_argument("--sweep", type=Path, help="folder of a sweep; without one it is not drawn")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for the pictures (default: %(default)s)")
    parser.add_argument("--chromium", default=None, help="browser to draw the page with; without one, only the terminal is drawn")
    arguments = parser.parse_args()
    findings = judge_again(arguments.run)
    arguments.out.mkdir(parents=True, exist_ok=True)
    _draw_terminal(findings, arguments.out / "terminal.svg")
    browser = arguments.chromium or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        print("terminal.svg is drawn; the page needs Chromium: install it, or name it with --chromium PATH.", file=sys.stderr)
        return 1
    pages = {"run": render_html(findings)}
    if arguments.training is not None:
        pages["training"] = render_training_html(*read_training(arguments.training))
    if arguments.sweep is not None:
        pages["sweep"] = render_sweep_html(read_sweep(arguments.sweep))
    drawn = [picture for picture in PICTURES if picture.of in pages]
    for picture in drawn:
        _draw_page(browser, pages[picture.of], picture, arguments.out / picture.file)
    return _too_large([arguments.out / picture.file for picture in drawn])


def _draw_terminal(findings: Findings, target: Path) -> None:
    console = Console(
        record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False, markup=False, emoji=False
    )
    console.print(Text.from_ansi(render_text(findings, width=80, colour=True)))
    drawing = console.export_svg(title="rightbatch find", unique_id="terminal")
    # The drawing must load nothing: the fonts it would fetch are left out, and the reader's own monospace font is used.
    target.write_text(re.sub(r"@font-face\s*\{.*?\}", "", drawing, flags=re.DOTALL), encoding="utf-8")


def _draw_page(browser: str, page: str, picture: Picture, target: Path) -> None:
    theme, width, height = f"#{picture.theme}", picture.width, picture.height
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


def _too_large(files: list[Path]) -> int:
    large = [file for file in files if file.stat().st_size > LARGEST_BYTES]
    for file in large:
        print(f"{file.name} is larger than {LARGEST_BYTES // 2**10} KiB: draw less of the page.", file=sys.stderr)
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main())
