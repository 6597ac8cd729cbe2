"""What the doctor finds, a line each, and the report that goes into a bug report."""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..errors import InputError

LEVELS = ("ok", "look", "wrong")
MOST_LINES, LINE = 24, 96  # of the report: one screen


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        level: "ok", "look" (unusual; may be meant) or "wrong".
        about: the part or question, a word or two.
        found: what was seen, with its figure; no paths and no names of files outside the released layout.
        advice: what it means and what to do; empty where all is well.
    """

    level: str
    about: str
    found: str
    advice: str = ""


@dataclass
class Findings:
    """All lines so far; each is printed as it comes.

    Attributes:
        out: takes a line of text.
        found: the lines, in order.
    """

    out: Callable[[str], None] = print
    found: list[Finding] = field(default_factory=list)

    def add(self, level: str, about: str, found: str, advice: str = "") -> None:
        """Print a line and keep it. Raises ValueError for an unknown level."""
        if level not in LEVELS:
            raise ValueError(f"level {level!r}: expected one of {LEVELS}")
        self.found.append(Finding(level, about, found, advice))
        self.out(f"{level:5}  {about}: {found}")
        if advice:
            self.out(f"       {advice}")

    @contextmanager
    def part(self, about: str):
        """An InputError inside becomes a line that is wrong, and the doctor goes on behind it."""
        try:
            yield
        except InputError as error:
            self.add("wrong", about, error.found, f"Expected {error.expected}. {error.remedy}")

    def worst(self) -> str:
        """The highest level so far."""
        return max((finding.level for finding in self.found), key=LEVELS.index, default="ok")

    def report(self, head: list[str], hidden: list[str]) -> str:
        """One screen to paste: what was run on, what is not ok in full, and the rest in short.

        Args:
            head: lines about the machine and the checkpoint's sizes.
        hidden: words that are not to be told (names of folders and people), longest first.
        """
        bad = [f for f in self.found if f.level != "ok"]
        good = [f for f in self.found if f.level == "ok"]
        lines = [
            *head,
            *(f"{f.level}: {f.about}: {f.found}" for f in bad),
            *(f"ok: {f.about}: {f.found}" for f in good),
        ]
        if len(lines) > MOST_LINES:
            left = len(lines) - MOST_LINES + 1
            lines = [*lines[: MOST_LINES - 1], f"({left} more lines above)"]
        text = "\n".join(line if len(line) <= LINE else line[: LINE - 3] + "..." for line in lines)
        for word in hidden:
            text = text.replace(word, "...")
        return text


def progress(text: str) -> None:
    """Show where the doctor is, where somebody looks: one line that the next one overwrites."""
    if sys.stderr.isatty():
        print(f"\r{text[:LINE]:{LINE}}", end="" if text else "\r", file=sys.stderr, flush=True)
