"""The last line of a terminal: one bar for what runs now, while everything that is printed goes above it."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

Item = TypeVar("Item")
FILE_VARIABLE, CLOSING_VARIABLE = "LABELFREE_PROGRESS", "LABELFREE_CLOSING_SECONDS"
"""Where a run that another process started says how far it is, and how long its closing work will take as earlier runs
have it: variables of the environment."""
REFRESHES = 4
"""A second: drawing costs a few milliseconds, and steps need not be counted one by one."""


class Screen:
    """One bar at the bottom: what runs, how far it is, and a text. A new bar takes the place of the one before."""

    def __init__(self) -> None:
        line = Column(no_wrap=True, overflow="ellipsis")
        columns = (
            TextColumn("{task.description}", table_column=line, markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True), markup=False),
            TextColumn("{task.fields[text]}", table_column=line, markup=False),
        )
        self.progress = Progress(
            *columns, console=Console(stderr=True), transient=True, refresh_per_second=REFRESHES, expand=False
        )
        self.former: list[tuple[logging.StreamHandler, TextIO]] = []
        self.parts: dict[str, int] = {}
        self.reached: dict[str, int] = {}
        self.title = self.within = ""
        self.began = 0.0

    def start(self) -> None:
        stream = sys.stderr
        self.progress.start()  # takes sys.stdout and sys.stderr
        for handler in handlers():
            if handler.stream in (stream, sys.__stderr__):
                self.former.append((handler, handler.stream))
                handler.setStream(sys.stderr)

    def stop(self) -> None:
        self.progress.stop()
        for handler, stream in self.former:
            handler.setStream(stream)
        self.former.clear()

    def bar(self, what: str, total: int | None, done: int = 0) -> None:
        """Begin a bar; the one before is gone. Without a total it only says that something runs."""
        self.parts, self.reached, self.title, self.began = {}, {}, "", time.perf_counter()
        for task in self.progress.task_ids:
            self.progress.remove_task(task)
        self.progress.add_task(what, total=total, completed=done, text="", left="")

    def update(
        self,
        what: str | None = None,
        done: int | None = None,
        text: str | None = None,
        left: str | None = None,
        total: int | None = None,
    ) -> None:
        """Change what is given of the bar; nothing is drawn here."""
        given = {"description": what, "completed": done, "text": text, "left": left, "total": total}
        task = self.progress.tasks[-1].id
        self.progress.update(task, **{key: value for key, value in given.items() if value is not None})

    def plan(self, what: str, parts: dict[str, int]) -> None:
        """Begin a bar for several parts, so many items each; `counted` and `items` fill it."""
        self.bar(what, sum(parts.values()))
        self.title, self.parts = f"{what}: ", dict(parts)

    def items(self, what: str, done: int, count: int) -> None:
        """`done` of the `count` items of a part are done; a part that was not planned prolongs the bar."""
        if not self.progress.tasks:
            self.bar(what, 0)
        what = self.within + what
        planned = self.parts.setdefault(what, count)
        self.reached[what] = round(min(done, count) * planned / max(1, count))
        reached, total = sum(self.reached.values()), sum(self.parts.values())
        left = (time.perf_counter() - self.began) * (total - reached) / reached if reached else None
        left = None if left is None else f"about {clock(left)} left"
        self.update(self.title + what, reached, left=left, total=total)


_shown: list[Screen] = []


def current() -> Screen | None:
    """The screen that is shown, in the one process that shows it."""
    return _shown[-1] if _shown else None


@contextmanager
def showing(mode: str) -> Iterator[None]:
    """While this runs, `current` is a screen, where `mode` (`trainer.progress`) and the terminal want a bar."""
    from lightning.pytorch.utilities import rank_zero_only  # not above: a wrong word answers without torch

    if progress_mode(mode) != "bar" or rank_zero_only.rank != 0 or _shown:
        yield
        return
    screen = Screen()
    _shown.append(screen)
    screen.start()
    try:
        yield
    finally:
        _shown.remove(screen)
        screen.stop()


def progress_mode(mode: str) -> str:
    """`trainer.progress` as this process can have it: bars in a terminal alone, where `auto` takes one too."""
    if mode not in ("auto", "bar"):
        return mode
    terminal = sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb", "unknown")
    return "bar" if terminal and (mode == "bar" or sys.stdout.isatty()) else "lines"


def counted(items: Iterable[Item], what: str, count: int) -> Iterator[Item]:
    """The items, counted on the bar as a part of it, where there is one."""
    screen = current()
    if screen is not None:
        screen.items(what, 0, count)
    for number, item in enumerate(items, start=1):
        yield item
        if screen is not None:
            screen.items(what, number, count)


@contextmanager
def within(name: str) -> Iterator[None]:
    """What is counted in here are parts of something that has a name of its own."""
    screen = current()
    if screen is not None:
        screen.within = f"{name}, "
    try:
        yield
    finally:
        if screen is not None:
            screen.within = ""


def handlers() -> list[logging.StreamHandler]:
    """All handlers that print."""
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    found = [handler for item in loggers for handler in getattr(item, "handlers", ())]
    return [handler for handler in found if type(handler) is logging.StreamHandler]


class Above:
    """A stream of a process that was forked off: what it writes begins on the line of the bar, which is drawn anew."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(text if text == "\n" else f"\r\x1b[2K{text}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def plain_streams() -> None:
    """In a process that was forked off (a reader of pictures): print past the screen, whose locks may be held."""
    if not _shown:
        return
    for handler, stream in _shown[-1].former:
        handler.stream = Above(stream)
    _shown.clear()
    sys.stdout, sys.stderr = Above(sys.__stdout__), Above(sys.__stderr__)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=plain_streams)


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 4:05."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
