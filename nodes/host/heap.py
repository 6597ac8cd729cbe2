"""What a dropped checkpoint and its work leave free in the C library's heap goes back to the system.

glibc keeps free pages between blocks in use for as long as the process lives: a fifth of it after a thousand prompts
and the host's /free.
"""

import ctypes
import sys
import threading
import weakref

# The host drops its caches one after the other and then collects; what lies beside the checkpoint is free after that.
SECONDS = 1.0


def trim_when_gone(held: object) -> None:
    """Have the heap's free pages returned a moment after an object has gone."""
    weakref.finalize(held, _soon).atexit = False


def _soon() -> None:
    timer = threading.Timer(SECONDS, trim)
    timer.daemon = True
    timer.start()


def trim() -> None:
    """Return free pages to the system where the C library is glibc; other systems do so by themselves."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
