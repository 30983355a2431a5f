"""Where progress is drawn, and what it looks like there."""

import io
import sys
import types

import pytest
from rich.console import Console

import rightbatch.progress
from rightbatch.progress import DrawnProgress, drawn_progress, drawn_sweep
from rightbatch.records.sweep import TrialSpec
from rightbatch.sweeps.request import SweepStage


class Paper:
    """A canvas of 80 columns that keeps every picture."""

    def __init__(self):
        self.pictures = []

    def redraw(self, picture):
        console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
        with console.capture() as capture:
            console.print(picture)
        self.pictures.append(capture.get().splitlines())


class Terminal(io.StringIO):
    encoding: str = "utf-8"

    def isatty(self):
        return True


class Handle:
    def __init__(self, texts):
        self._texts = texts

    def update(self, bundle, *, raw):
        assert raw
        self._texts.append(bundle["text/plain"])


@pytest.fixture
def cell(monkeypatch):
    """What the cell of a notebook has shown, one text after another."""
    monkeypatch.setattr(rightbatch.progress, "_REDRAWN_EVERY_S", 0.0)
    texts = []
    shell = types.SimpleNamespace(kernel=object())
    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: shell
    display.display = lambda bundle, *, raw, display_id: Handle(texts)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return texts


def terminal_of(monkeypatch):
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    return stderr


def test_a_long_detail_leaves_the_bar_its_place_at_80_columns():
    paper = Paper()
    shown = DrawnProgress(paper)
    for stage, detail in (("training", "12600/18000 samples · " * 10), ("memory", ""), ("gradient noise", "[red]x[/red]")):
        shown.update(stage, 0.5, detail)
    first, *lines = paper.pictures

    assert first[0].startswith("starting ")
    assert {len(drawn[0]) for drawn in lines} == {len("gradient noise") + 1 + 40 + 1 + len("0:00:00")}
    assert lines[0][1].endswith("…")
    assert len(lines[0][1]) <= 80
    assert lines[2][1].rstrip() == "[red]x[/red]"


def test_a_terminal_is_drawn_on_and_left_clean(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with drawn_progress(quiet=False) as drawn:
        drawn.update("memory", 0.5, "trying 128")

    assert "trying 128" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")


def test_what_a_program_prints_meanwhile_stays_on_its_stdout(monkeypatch, capsys):
    terminal_of(monkeypatch)
    with drawn_progress(quiet=False):
        sys.stdout.write("an own line\n")

    assert capsys.readouterr().out == "an own line\n"


def test_a_cell_shows_the_bar_and_is_empty_in_the_end(cell):
    with drawn_progress(quiet=False) as drawn:
        drawn.update("memory", 0.5, "trying 128")

    assert [text.splitlines()[0].split()[0] if text else "" for text in cell] == ["starting", "memory", ""]
    assert cell[1].splitlines()[1] == "trying 128"


def test_a_cell_is_not_drawn_for_every_word(cell, monkeypatch):
    monkeypatch.setattr(rightbatch.progress, "_REDRAWN_EVERY_S", 1e6)
    with drawn_progress(quiet=False) as drawn:
        for percent in range(100):
            drawn.update("memory", percent / 100, "")

    assert [text.split()[:1] for text in cell] == [["starting"], []]


def test_a_sweep_in_a_cell_keeps_its_last_news_above(cell):
    running = TrialSpec(global_batch_size=32, lr=0.1, seed=0, most_samples=100)
    with drawn_sweep(quiet=False) as drawn:
        drawn.update(SweepStage(expected=9, news="3 sizes"))
        drawn.update(SweepStage(expected=9, running=(running,)))

    assert cell[1].splitlines()[:3] == ["3 sizes", "running: batch 32, lr 0.100, seed 0", "0 of about 9 trials"]


@pytest.mark.parametrize("where", ["pipe", "dumb terminal", "terminal without the characters", "shell without a kernel"])
def test_elsewhere_nothing_is_drawn(monkeypatch, cell, where):
    sys.modules["IPython"].get_ipython = lambda: types.SimpleNamespace() if where == "shell without a kernel" else None
    stderr = Terminal() if "terminal" in where else io.StringIO()
    monkeypatch.setattr(Terminal, "encoding", "ascii" if where == "terminal without the characters" else "utf-8")
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "dumb" if where == "dumb terminal" else "xterm")
    with drawn_progress(quiet=False) as progress, drawn_sweep(quiet=False) as sweep:
        assert progress is sweep is None

    assert (stderr.getvalue(), cell) == ("", [])


@pytest.mark.parametrize("why", ["quiet", "another rank"])
def test_who_is_quiet_or_not_the_first_rank_draws_nothing(monkeypatch, why):
    terminal_of(monkeypatch)
    if why == "another rank":
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
            monkeypatch.setenv(name, value)
    with drawn_progress(quiet=why == "quiet") as drawn:
        assert drawn is None
