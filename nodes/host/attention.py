"""The host's attention for the decoder, where its user or the card asks for another than torch's own."""

import logging

import comfy.ldm.modules.attention as host
import comfy.model_management as management
import torch
from torch import nn

log = logging.getLogger(__name__)


def use_hosts_attention(module: nn.Module, device: torch.device) -> nn.Module:
    """Give a decoder the attention that the host was started with (--use-sage-attention and the others).

    Its default is torch's, which the decoder has already. On a CPU the host's other forms only save memory that torch's
    does not take.

    Args:
        module: an `llada_core.decoder.transformer.SemanticDecoder`.
        device: that computes.

    Returns:
        The same module.
    """
    if management.is_device_cpu(device) or host.optimized_attention is host.attention_pytorch:
        return module
    chosen = host.optimized_attention

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Heads apart in, together out (llada_core.decoder.blocks.Attend)."""
        return chosen(q, k, v, q.shape[1], skip_reshape=True)

    log.info("LLaDA-Uni: the decoder computes with the host's %s", getattr(chosen, "__name__", "attention"))
    setattr(module, "attention", attention)  # noqa: B010 nn.Module declares attributes to be tensors or modules
    return module
