"""Every choice a caller can make, as frozen dataclasses that validate themselves."""

from dataclasses import dataclass

from .checks import check_choice, check_count, check_flag, check_range, check_seed
from .errors import InputError

# How the layers lie in memory; `quantization.choices` says what becomes of each part.
WEIGHTS = ("as stored", "8-bit", "4-bit")
CONFIDENCE_KINDS = ("low_confidence", "top_k_margin", "neg_entropy")
IMAGE_STEPS, TEXT_STEPS = 8, 32  # Sampling.steps by default: blocks of images, of text
TURBO_STEPS, NORMAL_STEPS = 8, 50  # Decoding.steps by default
EDIT_GUIDANCE = 4.0  # Guidance.text by default when editing

# The upper ends of ranges, which the nodes' widgets have as well: a value beyond them is a slip, and some cost hours.
MAX_BLOCK = 1024  # Sampling.block_length
MAX_STEPS = 1024  # rounds of a block, a position each
MAX_NEW_TOKENS = 16_384  # of a plan, an answer, or a text of a story
MAX_TOP_K = 1_000_000
MAX_TEMPERATURE = 100.0
MAX_GUIDANCE = 100.0
MAX_IMAGES = 16  # of a story
MAX_BATCH = 64  # of images drawn at once from one prompt
MAX_DECODER_STEPS = 1000


@dataclass(frozen=True)
class Sampling:
    """Block diffusion (docs/model.md, Block diffusion).

    Attributes:
        steps: rounds a block may take, 1 to 1024. None: the task's default (8 for images, 32 for text).
        block_length: positions filled together, 1 to 1024; 32 as trained.
        threshold: confidence in 0...1 above which a token is accepted at once.
        temperature: 0 to 100; 0 takes the most probable token, more draws at random.
        top_k: candidates kept when drawing, up to 1,000,000; 0 keeps all.
        top_p: probability mass kept when drawing, in (0, 1].
        thinking_steps: rounds a block may take while thinking, 1 to 1024.
        thinking_length: the most new tokens a plan may have, 1 to 16,384.
    """

    steps: int | None = None
    block_length: int = 32
    threshold: float = 0.95
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    thinking_steps: int = 32
    thinking_length: int = 4096

    def __post_init__(self):
        if self.steps is not None:
            check_count("steps", self.steps, 1, MAX_STEPS, "Each block needs at least one round.")
        check_count("block_length", self.block_length, 1, MAX_BLOCK, "Use 32, the length the model was trained with.")
        check_range("threshold", self.threshold, 0.0, 1.0)
        check_range("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        check_count("top_k", self.top_k, 0, MAX_TOP_K, "Use 0 to keep every candidate.")
        check_range("top_p", self.top_p, 0.0, 1.0, "Use 1 to keep every candidate.")
        if self.top_p == 0:
            raise InputError("top_p", self.top_p, "a number above 0 and up to 1", "Use 1 to keep every candidate.")
        check_count("thinking_steps", self.thinking_steps, 1, MAX_STEPS, "Each block needs at least one round.")
        check_count("thinking_length", self.thinking_length, 1, MAX_NEW_TOKENS, "Use 4096, the model's default.")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (docs/model.md, Guidance).

    Attributes:
        text: scale of the instruction, 0 to 100; 1 means none for text to image, 0 none for editing.
        image: scale of the reference images when editing, 0 to 100; 0 means none.
        rescale: 0...1, how far the guided logits are drawn back to the spread of the conditional ones.
    """

    text: float = 2.0
    image: float = 0.0
    rescale: float = 0.7

    def __post_init__(self):
        check_range("guidance", self.text, 0.0, MAX_GUIDANCE)
        check_range("image_guidance", self.image, 0.0, MAX_GUIDANCE)
        check_range("guidance_rescale", self.rescale, 0.0, 1.0)


@dataclass(frozen=True)
class Sprint:
    """SPRINT: sparse prefix retention and non-uniform unmasking (docs/model.md, SPRINT, paper section 2.3).

    Attributes:
        keep_ratio: share of prefix positions kept where a modality has no ratio of its own, 0...1.
        text_keep_ratio, image_keep_ratio: the same for text and image positions; None uses keep_ratio.
        threshold: confidence in 0...1 above which a token is accepted.
        warmup: rounds of each block that see the whole prefix, 0 to 1024.
        alpha: 0...1, weight of the key norm against the model's confidence in a position's score.
        confidence: "low_confidence" (top-1 probability), "top_k_margin" or "neg_entropy".
    """

    keep_ratio: float = 0.5
    text_keep_ratio: float | None = 1.0
    image_keep_ratio: float | None = 0.8
    threshold: float = 0.93
    warmup: int = 1
    alpha: float = 0.5
    confidence: str = "low_confidence"

    def __post_init__(self):
        check_range("keep_ratio", self.keep_ratio, 0.0, 1.0)
        for name in ("text_keep_ratio", "image_keep_ratio"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0.0, 1.0)
        check_range("threshold", self.threshold, 0.0, 1.0)
        check_count("warmup", self.warmup, 0, MAX_STEPS, "1 is the paper's setting.")
        check_range("alpha", self.alpha, 0.0, 1.0)
        check_choice("confidence", self.confidence, CONFIDENCE_KINDS)


@dataclass(frozen=True)
class Decoding:
    """Tokens to pixels (docs/model.md, Decoding).

    Attributes:
        turbo: the distilled decoder (8 rounds, no guidance) instead of the normal one (50 rounds).
        steps: N of the sampler, up to 1000, 0 for the decoder's own default. Normal evaluates N - 1 times, so at
            least 2.
        seed: the noise, 0 to 2**64 - 1; image i of a batch uses seed + i.
        guidance: scale against zero features, 0 to 100, normal decoder only; 0 means one evaluation a round.
    """

    turbo: bool = True
    steps: int = 0
    seed: int = 0
    guidance: float = 1.0

    def __post_init__(self):
        check_flag("turbo", self.turbo)
        check_count("steps", self.steps, 0, MAX_DECODER_STEPS, "Use 0 for the decoder's own default.")
        if self.steps == 1 and not self.turbo:
            raise InputError("steps", 1, "0 or at least 2 for the normal decoder", "N steps are N - 1 evaluations.")
        check_seed(self.seed)
        check_range("decoder guidance", self.guidance, 0.0, MAX_GUIDANCE)

    @property
    def rounds(self) -> int:
        """N of the sampler with the default filled in."""
        return self.steps or (TURBO_STEPS if self.turbo else NORMAL_STEPS)
