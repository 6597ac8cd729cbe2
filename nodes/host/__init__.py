"""All that the nodes know of ComfyUI: folders, memory management, progress. Nothing else imports comfy.*"""

from .component_manager import HostComponentManager
from .folders import (
    checkpoint_names,
    checkpoint_path,
    fingerprint,
    next_token_file,
    token_file,
    token_file_names,
)
from .progress import Reporter, blocked, say

__all__ = [
    "HostComponentManager",
    "Reporter",
    "blocked",
    "checkpoint_names",
    "checkpoint_path",
    "fingerprint",
    "next_token_file",
    "say",
    "token_file",
    "token_file_names",
]
