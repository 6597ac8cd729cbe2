"""All that the nodes know of ComfyUI: folders, memory management, progress. Nothing else imports comfy.*"""

from comfy.model_patcher import ModelPatcher

from .folders import (
    check_token_prefix,
    checkpoint_fingerprint,
    checkpoint_names,
    checkpoint_path,
    next_token_file,
    token_file,
    token_file_fingerprint,
    token_file_names,
)
from .links import can_link
from .model import HostedModel, open_checkpoint
from .progress import Reporter, blocked, say
from .recent import key_of
from .zimage import zimage_missing

__all__ = [
    "HostedModel",
    "ModelPatcher",
    "Reporter",
    "blocked",
    "can_link",
    "check_token_prefix",
    "checkpoint_fingerprint",
    "checkpoint_names",
    "checkpoint_path",
    "key_of",
    "next_token_file",
    "open_checkpoint",
    "say",
    "token_file",
    "token_file_fingerprint",
    "token_file_names",
    "zimage_missing",
]
