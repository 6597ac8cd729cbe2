"""The harness starts a ComfyUI that imports torchaudio where there is none."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "dev" / "hosts" / "launch.py"
PROGRAM = """
import torchaudio, torchaudio.functional as F
from torchaudio.transforms import MelScale
class Mine(torchaudio.transforms.Resample): pass
print(MelScale.__name__, F.__name__, hasattr(torchaudio, "__version__"))
try:
    MelScale(80)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(importlib.util.find_spec("torchaudio") is not None, reason="torchaudio is installed here")
def test_a_stand_in_takes_the_place_of_torchaudio(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(LAUNCH), str(tmp_path / "program.py")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [
        "MelScale torchaudio.functional False",
        "torchaudio is a stand-in here; install it to work with sound",
    ]
