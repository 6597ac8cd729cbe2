"""How far a program is: for command lines."""

import shutil
import sys
import time


class Bar:
    """A line that fills up on a terminal; elsewhere a line every tenth of the way."""

    def __init__(self):
        self._live, self._said, self._last = sys.stderr.isatty(), -1, 0.0

    def __call__(self, share: float, what: str) -> None:
        now = time.monotonic()
        if self._live and (now - self._last > 0.2 or share >= 1):
            self._last = now
            width = max(10, min(40, shutil.get_terminal_size().columns - 50))
            filled = "#" * int(share * width)
            print(f"\r{100 * share:3.0f} % [{filled:<{width}}] {what[:40]:<40}", end="", file=sys.stderr, flush=True)
        elif not self._live and int(share * 10) > self._said:
            self._said = int(share * 10)
            print(f"{100 * share:3.0f} % {what}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._live:
            print(file=sys.stderr)
