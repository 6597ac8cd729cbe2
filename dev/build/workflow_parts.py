"""What several shipped workflows share: prompts, colours, the loader and the first column."""

from .graph_forms import Box, Column, note

CHECKPOINT = "LLaDA2.0-Uni"
ADDRESS = "https://huggingface.co/inclusionAI/LLaDA2.0-Uni"
BLUE, GREEN, PURPLE, GREY = "#3f789e", "#8A8", "#88A", "#777"

FOX = "A red fox asleep on a mossy stone wall at dawn, low mist over the fields behind it, soft side light, photograph"
STREET = "A narrow street in an old harbour town after rain, lanterns, wet cobblestones, evening, oil painting"


def loader() -> Box:
    """Load LLaDA-Uni."""
    return Box("LLaDAUniLoader", {"checkpoint": CHECKPOINT})


def start(model: Box, text: str, *more: Box) -> Column:
    """The first column: what to read, and the checkpoint."""
    where = f"**Checkpoint:** put its folder under models/llada_uni and choose it here. [Download]({ADDRESS})"
    return Column([note("What this does", f"{text}\n\n{where}"), model, *more], "Start here", GREY)
