"""What may come through a socket: anything else is refused by name, before a run where the host tells enough.

The host compares the types of links and looks at values that belong to widgets. A value where a link belongs passes
it, and so does what an output of any type hands on; the first is refused in validate_inputs, the second in execute.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple

import torch
from comfy_api.latest import io

from ..llada_core.checks import check_kind
from ..llada_core.errors import InputError, shown
from ..llada_core.image_tokens import ImageTokens
from ..llada_core.options import Sprint
from . import host
from .options import SamplingChoice
from .types import Model, SamplingOptions, SprintOptions, Tokens

ABSENT = object()  # the default of a socket in validate_inputs; a null in the graph is None


class Socket(NamedTuple):
    """What comes through sockets of a type, what a user calls it, and what to do when it does not."""

    kind: type
    expected: str
    remedy: str


SOCKETS = {
    Model.io_type: Socket(host.HostedModel, "a checkpoint", "Connect Load LLaDA-Uni."),
    Tokens.io_type: Socket(
        ImageTokens, "image tokens", "Connect SigLIP-VQ Encode, Diffusion-LLM Sample or Load Image Tokens."
    ),
    SamplingOptions.io_type: Socket(SamplingChoice, "sampling options", "Connect Sampling Options or nothing."),
    SprintOptions.io_type: Socket(Sprint, "SPRINT options", "Connect SPRINT Options or nothing."),
    io.Model.io_type: Socket(host.ModelPatcher, "a decoder as one of ComfyUI's own models", "Connect Load Decoder."),
    io.Image.io_type: Socket(torch.Tensor, "images", "Connect Load Image or another node that gives images."),
    io.Mask.io_type: Socket(torch.Tensor, "a mask", "Connect Load Image (mask), Pad Image Tokens, or nothing."),
}


def only_known_inputs(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, which refuses by name what its schema has not, and says what is missing.

    A host drops values of unknown inputs but hands on what a link to one brings, and runs, unchecked, the node that
    such a link comes from.
    """
    execute = vars(node)["execute"].__func__
    schema = node.define_schema()
    known = [spec.id for spec in schema.inputs]
    parameters = dict(list(signature(execute).parameters.items())[1:])
    defaults = {name for name, of in parameters.items() if of.default is not of.empty}

    @wraps(execute)
    def checked(cls: type[io.ComfyNode], *first: Any, **inputs: Any) -> io.NodeOutput:
        inputs |= dict(zip(parameters, first, strict=False))
        for name in inputs:
            if name not in known:
                expected = f"the inputs of {schema.display_name}: {', '.join(known)}"
                raise InputError(shown(name), "an input that this node has not", expected, "Remove its link.")
        for name in known:
            if name not in inputs and name not in defaults:
                raise InputError(name, "nothing", f"an input of {schema.display_name}", "Connect or set it.")
        return execute(cls, **inputs)

    node.execute = classmethod(checked)
    return node


def complaint(
    node: type[io.ComfyNode],
    linked: Mapping[str, str] | None,
    given: Mapping[str, Any],
    check: Callable[[], Any] = lambda: None,
) -> bool | str:
    """What validate_inputs answers: True, or the text of the first error.

    Args:
        node: the class, for its inputs.
        linked: names of inputs with a link, and the type that comes through it: the host's `input_types`. Who takes
            it compares types in the host's place. The value of such an input is not known yet.
        given: the sockets' values; `ABSENT` where the graph names none.
        check: looks at the widgets; called when the sockets are right.
    """
    linked = linked or {}
    try:
        for spec in node.define_schema().inputs:
            wanted = spec.get_io_type()
            if spec.id in linked:
                _check_link(spec.id, linked[spec.id], wanted)
            elif given.get(spec.id, ABSENT) is not ABSENT and not (spec.optional and given[spec.id] is None):
                _, expected, remedy = SOCKETS[wanted]
                raise InputError(spec.id, f"the value {shown(given[spec.id])}", f"a link to {expected}", remedy)
        check()
    except ValueError as error:
        return str(error)
    return True


def check_received(node: type[io.ComfyNode], **received: Any) -> None:
    """Raise InputError where a socket of `node` received what it does not take; None is nothing connected."""
    for spec in node.define_schema().inputs:
        if spec.id in received and not (spec.optional and received[spec.id] is None):
            kind, expected, remedy = SOCKETS[spec.get_io_type()]
            check_kind(spec.id, received[spec.id], kind, expected, remedy)


def _check_link(name: str, received: str, wanted: str) -> None:
    if not host.can_link(received, wanted):
        _, expected, remedy = SOCKETS.get(wanted, Socket(object, wanted, f"Connect an output of type {wanted}."))
        raise InputError(name, f"a link of type {received}", expected, remedy)
