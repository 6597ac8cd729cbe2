"""The list of nodes, as the host asks for it."""

import logging

from comfy_api.latest import ComfyExtension, io

from . import host
from .answer import ImageQA
from .decode import Decode
from .encode import Encode
from .interleave import Interleave
from .load import Loader
from .native_decoder import NODES as NATIVE_DECODER
from .options import SamplingNode, SprintNode
from .sample import Sample
from .sockets import only_known_inputs
from .token_edits import CropTokens, PadTokens, PasteTokens, PreviewTokens
from .token_files import JoinTokens, LoadTokens, SaveTokens
from .vary import Vary

log = logging.getLogger(__name__)


class LLaDAUniExtension(ComfyExtension):
    """All nodes of the pack, in the order in which a graph uses them."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The node classes; those of the decoder as the host's own model where it can be one."""
        missing = host.zimage_missing()
        if missing:
            log.info("LLaDA-Uni: Load Decoder and the nodes around it are not offered: %s", missing)
        nodes: tuple[type[io.ComfyNode], ...] = (
            Loader,
            Encode,
            Sample,
            SamplingNode,
            SprintNode,
            Decode,
            ImageQA,
            Interleave,
            JoinTokens,
            SaveTokens,
            LoadTokens,
            Vary,
            PadTokens,
            CropTokens,
            PasteTokens,
            PreviewTokens,
            *(() if missing else NATIVE_DECODER),
        )
        return [only_known_inputs(node) for node in nodes]
