"""Progress of a run: a bar in a terminal, otherwise a plain line every few seconds."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from zoo.text.markup import printable
from zoo.text.terminal import wrapped

EVERY = 10.0  # seconds between plain lines
MEMORY = 0.95  # share of the old value in the losses shown
ROOMY = 110  # columns of a terminal that has room for a long bar


class Display:
    """Shows the progress of the stages, in the first process only.

    Args:
        silent: show nothing.
        console: to print to; stderr if None, so that tables on stdout can be piped.
    """

    def __init__(self, silent: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr, quiet=silent, highlight=False)
        self.live = self.console.is_terminal and not silent
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._smooth: dict[str, float] = {}

    def note(self, text: str) -> None:
        """Print a line above the bar, as it is: it may end in a command."""
        (self._bar.console if self._bar else self.console).print(text, markup=False, soft_wrap=True)

    def begin(self, stage: str, steps: int, done: int = 0, what: str = "step") -> None:
        """Start a stage of `steps` steps, `done` of which were run before; `what` is a step called."""
        self.end()
        self.what = what
        self.stage, self.steps, self.first = stage, steps, done
        self.started = self.shown = time.monotonic()
        self._smooth = {}
        if self.live:
            wide = 20 if self.console.width >= ROOMY else 5
            columns = (_column("{task.description}"), BarColumn(bar_width=wide), _column("{task.fields[text]}"))
            self._bar = Progress(*columns, console=self.console, refresh_per_second=4)
            self._task = self._bar.add_task(printable(stage), total=steps, completed=done, text="")
            self._bar.start()

    def update(self, done: int, losses: Mapping[str, float], rate: float, unit: str, wait: float) -> None:
        """Show the progress of the stage.

        Args:
            done: steps run.
            losses: of the last step, by name; shown as a moving average.
            rate: images (or samples) per second.
            unit: what `rate` counts.
            wait: share of the time spent waiting for data.
        """
        for name, value in losses.items():
            old = self._smooth.get(name, value)
            self._smooth[name] = value if old != old else MEMORY * old + (1 - MEMORY) * value  # NaN: start again
        now = time.monotonic()
        if not (self._bar or now - self.shown >= EVERY or done == self.steps):
            return
        text = self._text(done, rate, unit, wait, now)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, text=text)
        else:
            self.shown = now
            self.console.print(wrapped(f"{self.stage}, {text}", subsequent="  "), markup=False, soft_wrap=True)

    def end(self) -> None:
        """Close the bar; its last state remains visible."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.end()

    def _text(self, done: int, rate: float, unit: str, wait: float, now: float) -> str:
        """Say where the stage is; beside a bar, what has no room there is left out."""
        pace = (now - self.started) / max(1, done - self.first)
        losses = " ".join(f"{name} {value:.3f}" for name, value in self._smooth.items())
        left, speed = (
            f"{clock(pace * (self.steps - done))} left",
            f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s",
        )
        parts = [
            f"{self.what} {done:,} of {self.steps:,}",
            losses,
            speed,
            f"waits for data {wait:.0%}" if wait > 0.03 else "",
            left,
        ]
        room = self.console.width - len(self.stage) - (22 if self.console.width >= ROOMY else 7)
        for leave in ("", speed, losses) if self._bar else ():
            parts = [part for part in parts if part and part != leave]
            if len(" | ".join(parts)) <= room:
                break
        return " | ".join(filter(None, parts))


def _column(text: str) -> TextColumn:
    return TextColumn(text, markup=False)  # names of stages and losses may contain brackets


def clock(seconds: float) -> str:
    """Write seconds as minutes and seconds, or hours and minutes."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d}"
