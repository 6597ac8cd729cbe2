"""A round from hidden states to ids, over buffers that stay where they are, so that a CUDA graph can hold it."""

from typing import cast

import torch

from ..backbone.head import Head
from ..options import Guidance, Sampling, Sprint
from .guidance import combine, rescale
from .sprint import least_accepted
from .unmask import accept, predict

LOGITS = 2**25  # numbers of guided logits that are held at once


class Unmasker:
    """What follows the backbone in a round: head, guidance, prediction, and which of the tokens are kept.

    Args:
        head: the backbone's.
        samples, branches, block: sizes.
        low, high: ids allowed, low <= id < high.
        mask_id: id of the mask token.
        sampling, guidance, sprint: as in `GenerationConfig`.
        device: of the computation.

    Attributes:
        ids: int64 [samples, block], the block: before a call what it holds, after it with what the round fixed.
        fillable: bool [samples, block], False for padding and prompt.
        uniform: float32 [samples, block], the numbers of the draws; not read at temperature 0.
        schedule: int64 [2, samples], the least that plain sampling fixes in this round, and the rounds that are left.
        report: int64 [samples, block + 1], what to read back: the ids, then whether all predictions were finite.
    """

    def __init__(
        self,
        head: Head,
        samples: int,
        branches: int,
        block: int,
        low: int,
        high: int,
        mask_id: int,
        sampling: Sampling,
        guidance: Guidance | None,
        sprint: Sprint | None,
        device: torch.device,
    ):
        self.head, self.low, self.high, self.mask_id = head, low, high, mask_id
        self.sampling, self.guidance, self.sprint = sampling, guidance, sprint
        self._shape = samples, branches
        self.ids = torch.full((samples, block), mask_id, device=device)
        self.fillable = torch.zeros(samples, block, dtype=torch.bool, device=device)
        self.uniform = torch.zeros(samples, block, device=device)
        self.schedule = torch.ones(2, samples, dtype=torch.int64, device=device)
        self.report = torch.zeros(samples, block + 1, dtype=torch.int64, device=device)
        self._rescales = guidance is not None and branches > 1 and guidance.rescale > 0
        # Without it the spread takes the logits of the whole vocabulary.
        self._factor = head.factor(device) if self._rescales and high - low < head.out_features else None
        width = head.out_features if self._rescales and self._factor is None else high - low
        kind = sprint.confidence if sprint else "low_confidence"
        self._best = branches == 1 and sampling.temperature == 0 and kind == "low_confidence"
        most = LOGITS
        if self._best and head.kernels.usable(torch.empty(0, device=device)):
            most = 4 * LOGITS  # of which nothing but the head makes a tensor: 16 texts of the release at once
        self._at_once = max(most // (block * width), 1)  # samples

    def __call__(self, hidden: torch.Tensor) -> None:
        """Take the hidden states of the block [samples * branches, block, hidden]; reads nothing back."""
        parts = (of.split(self._at_once) for of in (hidden.unflatten(0, self._shape), self.uniform))
        found = [self._predict(of, uniform) for of, uniform in zip(*parts, strict=True)]
        chosen, confidence = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        masked = self.fillable & (self.ids == self.mask_id)
        if self.sprint:
            threshold, least = self.sprint.threshold, least_accepted(masked.sum(-1), self.schedule[1])
        else:
            threshold, least = self.sampling.threshold, self.schedule[0]
        self.ids.copy_(torch.where(accept(confidence, masked, threshold, least), chosen + self.low, self.ids))
        self.report[:, :-1].copy_(self.ids)
        self.report[:, -1].copy_(confidence.isfinite().all(-1))

    def _predict(self, hidden: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `unmask.predict` returns, of hidden states [samples, branches, block, hidden]."""
        if self._best:
            return self.head.best(hidden[:, 0], self.low, self.high)
        kind = self.sprint.confidence if self.sprint else "low_confidence"
        return predict(self._logits(hidden), self.sampling, kind, uniform)

    def probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Guided probabilities of the allowed ids, hidden states as above -> float32 [samples, block, high - low]."""
        return self._logits(hidden.unflatten(0, self._shape)).softmax(-1)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Guided logits of the allowed ids, [samples, branches, block, hidden] -> float32 [samples, block, ids]."""
        if not self._rescales:
            return combine(self.head(hidden, self.low, self.high).float(), self.guidance)
        guidance = cast(Guidance, self.guidance)  # without one nothing is rescaled
        if self._factor is not None:
            g = combine(self.head(hidden, self.low, self.high).float(), self.guidance)
            c_std = self.head.std(hidden[:, 0], self._factor)
            g_std = self.head.std(combine(hidden.float(), self.guidance), self._factor)
            return rescale(g, c_std, g_std, guidance)
        logits = self.head(hidden).float()
        g = combine(logits, self.guidance)
        g = rescale(g, logits[:, 0].std(-1, keepdim=True), g.std(-1, keepdim=True), guidance)
        return g[..., self.low : self.high]
