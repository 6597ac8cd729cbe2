"""The list of nodes, as the host asks for it."""

from comfy_api.latest import ComfyExtension, io

from .answer import ImageQA
from .decode import Decode
from .encode import Encode
from .interleave import Interleave
from .load import Loader
from .options import SamplingNode, SprintNode
from .sample import Sample
from .token_files import JoinTokens, LoadTokens, SaveTokens


class LLaDAUniExtension(ComfyExtension):
    """All nodes of the pack, in the order in which a graph uses them."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The node classes."""
        return [
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
        ]
