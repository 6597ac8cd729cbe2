"""Importing transformers and diffusers where torchvision is a stand-in."""

import contextlib
import logging
import sys
from collections.abc import Iterator

log = logging.getLogger(__name__)


@contextlib.contextmanager
def without_partial_torchvision() -> Iterator[None]:
    """Hide a torchvision that lacks its transforms while libraries are imported.

    Nothing here needs torchvision, but transformers and diffusers import parts of it as soon as they see any. Some
    hosts put an empty module of that name in place.
    """
    found = sys.modules.get("torchvision")
    if found is None or hasattr(getattr(found, "transforms", None), "InterpolationMode"):
        yield
        return
    log.info("torchvision is a stand-in here; transformers and diffusers are imported without it")
    hidden = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torchvision"}
    for name in hidden:
        del sys.modules[name]
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # importing it now says that there is none
    try:
        yield
    finally:
        sys.modules.update(hidden)
