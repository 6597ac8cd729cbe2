"""Muon: steps along the nearest orthogonal matrix of the momentum, for the matrices inside a network.

K. Jordan and others, 2024 (kellerjordan.github.io/posts/muon); the factor that gives its steps the size of AdamW's, so
that both take one learning rate, is that of J. Liu and others, arXiv 2502.16982. Banks of matrices are taken matrix by
matrix, and all of one shape at once.
"""

import torch

_MOMENTUM = 0.95
_ROUNDS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pulls singular values towards 1
_SIZE = 0.2  # root mean square of a step of AdamW, about


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """[n, rows, columns] -> about U V^T of each one's singular value decomposition, in its dtype."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.flatten(1).norm(dim=-1)[:, None, None] + 1e-7)
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """The optimizer.

    Args:
        params: matrices [rows, columns], or banks of them [n, rows, columns].
        lr: as AdamW would have it.
        weight_decay: of a step, times lr.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step; matrices without a gradient stay."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape[-2:], []).append(p)
            for (rows, columns), params in shapes.items():
                flat = [p.grad.reshape(-1, rows, columns) for p in params]
                kept = [self._momentum(p) for p in params]
                torch._foreach_mul_(kept, _MOMENTUM)
                torch._foreach_add_(kept, flat)
                ahead = torch.cat(torch._foreach_add(flat, kept, alpha=_MOMENTUM))
                steps = orthogonal(ahead).split([len(one) for one in flat])
                scale = group["lr"] * _SIZE * max(rows, columns) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, [s.view_as(p) for s, p in zip(steps, params, strict=True)], alpha=-scale)

    def _momentum(self, p: torch.Tensor) -> torch.Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p).reshape(-1, *p.shape[-2:])
        return state["momentum"]


class Together:
    """Several optimizers as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        """Those of all."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        """All states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        """Restore all."""
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)
