"""Files that are never half there: written beside their place, and named when they are whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # ends the name of whatever is not finished


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to. The file gets its own name, and is on the disk, when the context ends well; else it goes.

    Raises:
        OSError: a full disk, among others.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
