"""The line that says how far a job is."""

import io
import sys

import pytest

from kangaroo_jax.system import progress as progress_module
from kangaroo_jax.system.progress import Progress, duration


class Clock:
    """In place of the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.9, "0:00:59"), (61, "0:01:01"), (3 * 3600 + 62 * 60 + 5, "4:02:05")]
)
def test_durations_are_hours_minutes_and_seconds(seconds, text):
    assert duration(seconds) == text


def test_what_an_earlier_run_did_is_done_and_no_part_of_the_rate(clock):
    lines: list[str] = []
    progress = Progress("ours", 2_000, "clips", lines.append, more=lambda: "7 calls")
    progress.add(1_000, skipped=True)
    clock.now = 4.9
    progress.add(10)
    assert lines == []
    clock.now = 10.0
    progress.add(10)
    assert lines == ["ours: 1,020 of 2,000 clips, 2.0/s, ETA 0:08:10; 7 calls"]
    progress.expect(20)
    progress.add(1_000)
    progress.finish()
    assert lines[1:] == ["ours: 2,020 of 2,020 clips, 102.0/s; 7 calls"]
    assert Progress("", 0, "clips", lines.append).line() == "0 of 0 clips, 0.0/s"


@pytest.mark.parametrize(
    ("total", "line"),
    [
        (16_700_000_000, "4.17 of 16.70 GB (25%), 2088 MB/s, ETA 0:00:06"),
        (5_000_000, "1.25 of 5.00 MB (25%), 1 MB/s, ETA 0:00:06"),
        (20_000, "5.00 of 20.00 kB (25%), 2 kB/s, ETA 0:00:06"),
        (40, "0.01 of 0.04 kB (25%), 0 kB/s, ETA 0:00:06"),
    ],
)
def test_bytes_have_the_unit_that_their_total_fills(clock, total, line):
    progress = Progress("orbax", total, "bytes", print)
    clock.now = 2.0
    progress.add(total // 4)
    assert progress.line() == f"orbax: {line}"


def test_on_a_terminal_a_line_takes_the_place_of_the_one_before(clock, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "20")
    progress = Progress("", 4, "clips")
    for _ in range(2):
        clock.now += 0.3
        progress.add()
    progress.say("bad")
    progress.finish()
    erase = "\r\x1b[K"
    assert screen.getvalue().split(erase)[1:] == [
        "1 of 4 clips, 3.3/s", "2 of 4 clips, 3.3/s", "bad\n", "2 of 4 clips, 3.3/s, ETA 0:00:00\n"
    ]  # fmt: skip
