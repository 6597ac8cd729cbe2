"""All that the nodes know of ComfyUI: folders, memory management, progress. Nothing else imports comfy.*"""

from .folders import (
    checkpoint_names,
    checkpoint_path,
    fingerprint,
    next_token_file,
    token_file,
    token_file_names,
)
from .progress import Reporter, blocked
from .residence import HostResidence

__all__ = [
    "HostResidence",
    "Reporter",
    "blocked",
    "checkpoint_names",
    "checkpoint_path",
    "fingerprint",
    "next_token_file",
    "token_file",
    "token_file_names",
]
