"""The engine: LLaDA2.0-Uni without ComfyUI. See `engine.LLaDAUni`."""

from .engine import Answer, Generation, LLaDAUni, OneDevice, Story
from .errors import CheckpointError, InputError
from .image_tokens import ImageTokens, join, load_tokens, save_tokens
from .options import Decoding, Guidance, Sampling, Sprint
from .progress import Interrupted, Progress, TokenPreview

__all__ = [
    "Answer",
    "CheckpointError",
    "Decoding",
    "Generation",
    "Guidance",
    "ImageTokens",
    "InputError",
    "Interrupted",
    "LLaDAUni",
    "OneDevice",
    "Progress",
    "Sampling",
    "Sprint",
    "Story",
    "TokenPreview",
    "join",
    "load_tokens",
    "save_tokens",
]
