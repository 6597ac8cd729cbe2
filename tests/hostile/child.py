"""Opens damaged files in a process of limited memory; see damage.py, which starts it.

Usage: python -m tests.hostile.child <folder of the log> <seed> <first case> <number of cases>
"""

import faulthandler
import json
import logging
import resource
import shutil
import signal
import sys
from pathlib import Path
from random import Random

import psutil
import torch

from dev.hosts.base_folder import CHECKPOINT
from llada_core.engine import LLaDAUni
from llada_core.errors import InputError
from llada_core.image_tokens import load_tokens, save_tokens
from llada_core.options import Decoding, Sampling
from tests.hostile.damage import CASE_SECONDS, ROOM, TOKENS, WORK_EVERY, damage, files, whole_folders

LONGEST = 1200  # characters of a message: a screen


def main() -> None:
    """Damage, open and restore, from the first case to the last."""
    log_folder, seed, first, count = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    logging.disable(logging.CRITICAL)
    folders = whole_folders()
    for folder in folders:
        use(folder, work=True)  # all that a first use allocates
    used = psutil.Process().memory_info().data + ROOM  # what a mapped file has of its own is not counted
    resource.setrlimit(resource.RLIMIT_DATA, (used, used))
    spares = [{name: (folder / name).read_bytes() for name in files(folder)} for folder in folders]

    def note(**line) -> None:
        with (log_folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    try:
        for index in range(first, count):
            random = Random(f"{seed} {index}")
            which = random.choice((0, 0, 1, 2))
            folder, spare = folders[which], spares[which]
            name = random.choice(sorted(spare))
            what = f"{folder.parent.name}/{name}: {damage(random, folder / name)}"
            note(kind="begun", index=index, what=what)
            note(index=index, what=what, **outcome(folder, work=index % WORK_EVERY == 0))
            restore(folder, name, spare[name])
    finally:
        shutil.rmtree(folders[0].parents[1], ignore_errors=True)


def restore(folder: Path, name: str, data: bytes) -> None:
    """Put a file back, whatever is in its place."""
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(data)


def outcome(folder: Path, work: bool) -> dict[str, str]:
    """What comes of opening a damaged checkpoint and its token file."""

    def late(*_) -> None:
        raise TimeoutError(f"{CASE_SECONDS} s were not enough")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(CASE_SECONDS)
    faulthandler.dump_traceback_later(CASE_SECONDS + 20, exit=True)  # where no Python runs that could hear the signal
    try:
        use(folder, work)
    except InputError as error:
        if len(str(error)) > LONGEST:
            return {"kind": "FAULT", "detail": f"a message of {len(str(error))} characters: {str(error)[:200]}"}
        return {"kind": "clear error", "detail": str(error)[:300]}
    except BaseException as error:  # a panic of a library in Rust is no Exception
        return {"kind": "FAULT", "detail": f"{type(error).__name__}: {error}"[:500]}
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    return {"kind": "opened", "detail": ""}


def use(folder: Path, work: bool) -> None:
    """Read the token file, open the checkpoint, load every part, and on demand draw, decode, look and answer."""
    save_tokens(load_tokens(folder / TOKENS), folder.parent / TOKENS)
    model = LLaDAUni(folder)
    model.palette()
    for component in model.components.values():
        component.load(torch.float32)
    if work:
        drawn = model.generate("a fox", 64, 64, sampling=Sampling(steps=2))
        for turbo in (True, False):
            if model.layout.has("decoder-turbo" if turbo else "decoder"):
                picture = model.decode(drawn.tokens, Decoding(turbo, steps=2))[0]
        if model.layout.has("image_tokenizer"):
            model.answer("What?", model.encode(picture[None], pixels=1024), max_new_tokens=4)


if __name__ == "__main__":
    assert CHECKPOINT.is_dir()
    main()
