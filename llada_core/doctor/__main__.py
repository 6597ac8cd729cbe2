"""First contact with a checkpoint: is all well with it, and if not, what to do?

    python -m llada_core.doctor FOLDER [--device cuda] [--quick]

Looks at the folder, the headers and the tokenizer, then at every tensor, one at a time. Without --quick it also draws,
answers, and sends a picture there and back, on DEVICE. Each line says ok, look or wrong, and what it means. It ends in
a report of one screen, without paths and names, to paste into a bug report. Exit status: 1 where something is wrong.
"""

import argparse
import getpass
import platform
import resource
import sys
import time
from pathlib import Path

import torch

from ..engine import LLaDAUni, OneDevice
from .files import examine_files
from .findings import Findings
from .runs import examine_runs
from .tensors import examine_tensors


def examine(folder: Path, device: torch.device, quick: bool, findings: Findings) -> str:
    """Everything, in order; returns the report."""
    began = time.perf_counter()
    components, config = examine_files(folder, findings)
    examine_tensors(components, findings)
    if not quick and findings.worst() != "wrong":
        manager = OneDevice(device, None if device.type != "cpu" else torch.float32)
        with findings.part("opening"):
            examine_runs(LLaDAUni(folder, manager), manager, findings)
    elif not quick:
        findings.out("       Nothing was run: first mend what is wrong.")
    head = [
        "llada_core.doctor report",
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}, {_device_name(device)}",
        f"peak memory {_peak(device) / 1e9:.1f} GB, {time.perf_counter() - began:.0f} s{', quick' if quick else ''}",
    ]
    if config is not None:
        head.append(f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.num_experts} experts")
    return findings.report(head, _hidden(folder))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _hidden(folder: Path) -> list[str]:
    """What the report leaves out: where the folder lies, what it is called, and who is at the machine."""
    resolved = folder.resolve()
    words = {str(folder), str(resolved), str(resolved.parent), resolved.name, str(Path.home()), getpass.getuser()}
    return sorted((word for word in words if len(word) > 3), key=len, reverse=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="where to run; here: %(default)s")
    parser.add_argument("--quick", action="store_true", help="run nothing")
    given = parser.parse_args(arguments)
    findings = Findings()
    report = examine(given.folder, torch.device(given.device), given.quick, findings)
    print(f"\n--- paste this into a report ---\n{report}\n--- end ---")
    return 1 if findings.worst() == "wrong" else 0


if __name__ == "__main__":
    sys.exit(main())
