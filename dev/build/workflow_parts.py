"""What several shipped workflows share: prompts, colours, the loader and the first column."""

from dev.hosts.scenes import ENLARGED, PROMPTS, REFINED, TRIED

from .graph_forms import Box, Column, note

CHECKPOINT = "LLaDA2.0-Uni"
ADDRESS = "https://huggingface.co/inclusionAI/LLaDA2.0-Uni"
BLUE, GREEN, PURPLE, GREY = "#3f789e", "#8A8", "#88A", "#777"

FOX = "A red fox asleep on a mossy stone wall at dawn, low mist over the fields behind it, soft side light, photograph"
STREET = "A narrow street in an old harbour town after rain, lanterns, wet cobblestones, evening, oil painting"


def loader() -> Box:
    """Load LLaDA-Uni."""
    return Box("LLaDAUniLoader", {"checkpoint": CHECKPOINT})


def start(name: str, model: Box, text: str, *more: Box) -> Column:
    """The first column: what to read, and the checkpoint.

    A note is paragraphs, whose translations web/templates.zh.json has.
    """
    where = f"**Checkpoint:** put its folder under models/llada_uni and choose it here. [Download]({ADDRESS})"
    return Column([note("What this does", "\n\n".join((text, where, *_tried(name)))), model, *more], "Start here", GREY)


def _tried(name: str) -> tuple[str, str]:
    """How to run a workflow on the miniature: what to choose, and a prompt that is known to work."""
    chosen = "**With nothing downloaded:** choose the checkpoint *miniature*"
    if name == "story":
        return f"{chosen} and this instruction:", f"*{PROMPTS[name]}*"
    if name == "outpaint":
        picture = "as picture its drawing of this sentence, 256 wide and 192 high; top and bottom 32, left and right 0"
        return f"{chosen}, {picture}, and the sentence again as prompt:", f"*{PROMPTS[name]}*"
    if name in ENLARGED:
        return (
            f"{chosen}, width and height 256, denoise {REFINED} in *Then refine*, and this prompt:",
            f"*{PROMPTS[name]}*",
        )
    if name not in TRIED:
        return f"{chosen}, width and height 256, and this prompt:", f"*{PROMPTS[name]}*"
    tried = TRIED[name]
    if len(tried.pictures) == 2:
        pictures = "as first picture what the template *miniature* drew, as second its drawing of the first sentence"
        return f"{chosen}; {pictures} here; the second sentence is the prompt:", f"*{tried.drawn}*\n\n*{tried.prompt}*"
    asked = "question" if name == "image-qa" else "prompt"
    return f"{chosen}, as picture what the template *miniature* drew, and this {asked}:", f"*{tried.prompt}*"
