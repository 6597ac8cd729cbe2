"""Save, Load and Join Image Tokens."""

from comfy_api.latest import io

from ..llada_core.image_tokens import join, load_tokens, save_tokens
from . import host
from .sockets import ABSENT, check_received, complaint
from .types import CATEGORY, Tokens, found_as, tokens_input


class JoinTokens(io.ComfyNode):
    """Join Image Tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniJoinTokens",
            display_name="Join Image Tokens",
            category=CATEGORY,
            **found_as("several references", "combine tokens"),
            description="Puts images in a row: several references for an edit, several pictures for a question.",
            inputs=[
                tokens_input("tokens_1", "The first images; the first of all gives an edit its size."),
                tokens_input("tokens_2", "The images after those."),
                tokens_input("tokens_3", "More images.", optional=True),
                tokens_input("tokens_4", "More images.", optional=True),
            ],
            outputs=[Tokens.Output(display_name="tokens", tooltip="All images, in order.")],
        )

    @classmethod
    def validate_inputs(
        cls, input_types=None, tokens_1=ABSENT, tokens_2=ABSENT, tokens_3=ABSENT, tokens_4=ABSENT
    ) -> bool | str:
        """Refuse values in place of links before anything runs."""
        sockets = {"tokens_1": tokens_1, "tokens_2": tokens_2, "tokens_3": tokens_3, "tokens_4": tokens_4}
        return complaint(cls, input_types, sockets)

    @classmethod
    def execute(cls, tokens_1, tokens_2, tokens_3=None, tokens_4=None) -> io.NodeOutput:
        """Join what is connected."""
        check_received(cls, tokens_1=tokens_1, tokens_2=tokens_2, tokens_3=tokens_3, tokens_4=tokens_4)
        return io.NodeOutput(join([part for part in (tokens_1, tokens_2, tokens_3, tokens_4) if part is not None]))


class SaveTokens(io.ComfyNode):
    """Save Image Tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniSaveTokens",
            display_name="Save Image Tokens",
            category=CATEGORY,
            **found_as("export tokens"),
            description="Writes image tokens to a small safetensors file in the output folder.",
            inputs=[
                tokens_input("tokens", "What to save."),
                io.String.Input(
                    "filename_prefix",
                    default="tokens/llada",
                    tooltip="Start of the file name; a slash makes a folder inside the output folder.",
                ),
            ],
            outputs=[Tokens.Output(display_name="tokens", tooltip="The same tokens.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, input_types=None, tokens=ABSENT, filename_prefix=None) -> bool | str:
        """Refuse a name that cannot be written while there are no tokens to lose yet."""
        return complaint(
            cls,
            input_types,
            {"tokens": tokens},
            lambda: filename_prefix is not None and host.check_token_prefix(filename_prefix),
        )

    @classmethod
    def execute(cls, tokens, filename_prefix: str) -> io.NodeOutput:
        """Write the next free file of that prefix."""
        check_received(cls, tokens=tokens)
        path, label = host.next_token_file(filename_prefix)
        save_tokens(tokens, path)
        host.say(cls.hidden, f"Saved: {label}")
        return io.NodeOutput(tokens, ui={"text": [label]})


class LoadTokens(io.ComfyNode):
    """Load Image Tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniLoadTokens",
            display_name="Load Image Tokens",
            category=CATEGORY,
            **found_as("import tokens"),
            description="Reads image tokens from a file in the input or output folder.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.token_file_names(),
                    tooltip="A file of Save Image Tokens; [output] marks those of the output folder.",
                ),
            ],
            outputs=[Tokens.Output(display_name="tokens", tooltip="The images of the file.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str:
        """Changes with the file."""
        return host.token_file_fingerprint(file)

    @classmethod
    def execute(cls, file: str | None = None) -> io.NodeOutput:
        """Read the file. A host runs a node that hangs on an input that no schema knows, even with nothing given."""
        return io.NodeOutput(load_tokens(host.token_file(file)))
