"""Writes the shipped workflows: graph, API form and thumbnail of each, the blueprints, and the help pages' pictures.

Each workflow is said once, below. Usage, after any change here or to a schema:

    python -m dev.build.build_workflows

The thumbnails show what the miniature makes of each, which takes a minute. Those of the decoder's own workflows want a
ComfyUI that knows Z-Image (`COMFYUI_PATH`); without one they stay as they are.
"""

import json
import tempfile
from pathlib import Path

from PIL import Image

from dev.hosts.in_process import InProcessHost
from dev.hosts.server import ComfyServer, find_comfyui, knows_zimage

from . import blueprints, decoder_workflows, token_workflows
from .graph_forms import Box, Column, Workflow, note
from .pictures import draw_help
from .schemas import ROOT, everything
from .showcase import Pictures, pictures_of, pictures_on_server, run
from .thumbnails import draw_thumbnail
from .workflow_parts import BLUE, FOX, GREEN, GREY, PURPLE, STREET, loader, start

OUT = ROOT / "workflows"
RIDDLE = (
    "The national bird of New Zealand shaking hands with the animal on the flag of Wales, children's book illustration"
)
POSTER = 'A poster of a lighthouse in a storm, with the words "KEEP THE LIGHT" in large white letters'
STORY = (
    "Tell a short story, in words and pictures, about a small robot that finds a seed and grows a garden on the moon."
)


def text_to_image() -> list[Column]:
    """A prompt to a picture."""
    model = loader()
    sample = Box("LLaDAUniSample", {"model": model, "prompt": FOX})
    decode = Box("LLaDAUniDecode", {"model": model, "tokens": sample}, after="randomize")
    save = Box("SaveImage", {"images": decode, "filename_prefix": "llada-uni/picture"})
    text = (
        "Draws a picture from a prompt, in two parts.\n\n"
        "**Sample** writes the picture as tokens. Change the prompt and the size here.\n\n"
        "**Decode** turns tokens into pixels. Its seed changes after each run, so queueing again draws other details "
        "of the same picture, and only Decode runs."
    )
    return [
        start("text-to-image", model, text),
        Column([sample], "What to draw", GREEN),
        Column([decode, save], "Tokens to pixels, and the result", BLUE),
    ]


def thinking_text_to_image() -> list[Column]:
    """A plan in words first, then the picture."""
    model = loader()
    options = Box("LLaDAUniSampling")
    sample = Box("LLaDAUniSample", {"model": model, "prompt": RIDDLE, "thinking": True, "sampling": options})
    decode = Box("LLaDAUniDecode", {"model": model, "tokens": sample}, after="randomize")
    save = Box("SaveImage", {"images": decode, "filename_prefix": "llada-uni/thinking"})
    plan = Box("PreviewAny", {"source": (sample, "thinking")}, title="The plan")
    text = (
        "With **thinking** on, the model first works out in words what the picture has to show. It takes longer and "
        "helps with prompts that need knowledge.\n\n"
        "**thinking_length** in Sampling Options limits the plan, **thinking_steps** the rounds for each block of it."
    )
    return [
        start("thinking-text-to-image", model, text, options),
        Column([sample], "What to draw", GREEN),
        Column([plan], "The plan", GREY),
        Column([decode, save], "Tokens to pixels, and the result", BLUE),
    ]


def edit() -> list[Column]:
    """A picture and an instruction to a changed picture."""
    model = loader()
    picture = Box("LoadImage", {"image": "example.png"})
    encode = Box("LLaDAUniEncode", {"model": model, "image": picture})
    prompt = "Turn it into a watercolour painting of an autumn day, keep the figure as it is"
    sample = Box("LLaDAUniSample", {"model": model, "prompt": prompt, "guidance": 4.0, "references": encode})
    decode = Box("LLaDAUniDecode", {"model": model, "tokens": sample}, after="randomize")
    save = Box("SaveImage", {"images": decode, "filename_prefix": "llada-uni/edit"})
    text = (
        "Changes a picture as the prompt says.\n\n"
        "The result has the shape of the picture at about 1024x1024 pixels. Sample's own width and height are not "
        "used.\n\n"
        "Guidance 4 is right for edits. If too little changes, raise it."
    )
    return [
        start("edit", model, text),
        Column([picture, encode], "Picture to change, to tokens", PURPLE),
        Column([sample], "What to change", GREEN),
        Column([decode, save], "Tokens to pixels, and the result", BLUE),
    ]


def edit_two_references() -> list[Column]:
    """Two pictures and an instruction that uses both."""
    model = loader()
    pictures = [Box("LoadImage", {"image": "example.png"}, f"{which} picture") for which in ("First", "Second")]
    encodes = [Box("LLaDAUniEncode", {"model": model, "image": picture}) for picture in pictures]
    join = Box("LLaDAUniJoinTokens", {"tokens_1": encodes[0], "tokens_2": encodes[1]})
    options = Box("LLaDAUniSampling")
    prompt = "Put the figure of the first picture into the scene of the second picture"
    inputs = {"model": model, "prompt": prompt, "guidance": 4.0, "references": join, "sampling": options}
    sample = Box("LLaDAUniSample", inputs, height=700)
    decode = Box("LLaDAUniDecode", {"model": model, "tokens": sample}, after="randomize")
    save = Box("SaveImage", {"images": decode, "filename_prefix": "llada-uni/edit-two"})
    text = (
        "Makes a picture from two others. **Choose two different pictures**; both start as the example.\n\n"
        "Join puts them in a row, up to four. The first gives the result its shape. In the prompt call them the first "
        "and the second picture.\n\n"
        "**image_guidance** in Sampling Options above 0 holds on to the pictures more closely, at half as much work "
        "again."
    )
    return [
        start("edit-two-references", model, text, options),
        Column([pictures[0], encodes[0], pictures[1]], "Pictures, to tokens", PURPLE),
        Column([encodes[1], join, sample], "In a row, and what to make of them", GREEN),
        Column([decode, save], "Tokens to pixels, and the result", BLUE),
    ]


def image_qa() -> list[Column]:
    """A question about a picture."""
    model = loader()
    picture = Box("LoadImage", {"image": "example.png"})
    question = "Describe this picture. What is in the foreground, and what is behind it?"
    ask = Box("LLaDAUniImageQA", {"model": model, "question": question, "image": picture})
    answer = Box("PreviewAny", {"source": ask}, title="Answer", height=400)
    text = (
        "Answers a question about a picture.\n\n"
        "Without a picture it answers from knowledge alone. A batch of pictures is looked at together; switch on "
        "**one_by_one** for an answer about each.\n\n"
        "This needs no decoder: a checkpoint without those folders is enough."
    )
    return [
        start("image-qa", model, text),
        Column([picture], "Picture", PURPLE),
        Column([ask], "Question", GREEN),
        Column([answer], "Answer", BLUE),
    ]


def sprint_side_by_side() -> list[Column]:
    """The same prompt plainly and with SPRINT."""
    model = loader()
    options = Box("LLaDAUniSprint")
    asked = {"model": model, "prompt": POSTER}
    plain = Box("LLaDAUniSample", asked, title="Sample, plain", height=654)
    fast = Box("LLaDAUniSample", {**asked, "sprint": options}, title="Sample, with SPRINT", height=654)
    decodes = [Box("LLaDAUniDecode", {"model": model, "tokens": tokens}, height=450) for tokens in (plain, fast)]
    saves = [
        Box("SaveImage", {"images": decode, "filename_prefix": f"llada-uni/{name}"}, title=title)
        for decode, name, title in zip(decodes, ("plain", "sprint"), ("Plain", "With SPRINT"), strict=True)
    ]
    text = (
        "Draws one prompt twice, to see what SPRINT costs: plainly, and with SPRINT.\n\n"
        "SPRINT hides the less useful part of what is already there and takes every token the model is sure of, so it "
        "needs fewer rounds. Small text in pictures suffers most.\n\n"
        "**Change the prompt in both** Sample nodes. Both Decode nodes have the same seed."
    )
    return [
        start("sprint-side-by-side", model, text, options),
        Column([plain, decodes[0]], "The prompt, plainly", GREEN),
        Column([fast, decodes[1]], "The same with SPRINT", PURPLE),
        Column(saves, "Compare", BLUE),
    ]


def turbo_and_normal() -> list[Column]:
    """One set of tokens decoded both ways."""
    model = loader()
    sample = Box("LLaDAUniSample", {"model": model, "prompt": STREET})
    keep = Box("LLaDAUniSaveTokens", {"tokens": sample, "filename_prefix": "llada-uni/street"})
    decodes = [
        Box("LLaDAUniDecode", {"model": model, "tokens": sample, "turbo": turbo}, title=title, height=448)
        for turbo, title in ((True, "Decode, turbo"), (False, "Decode, normal"))
    ]
    saves = [
        Box("SaveImage", {"images": decode, "filename_prefix": f"llada-uni/{name}"}, title=name.capitalize())
        for decode, name in zip(decodes, ("turbo", "normal"), strict=True)
    ]
    text = (
        "Decodes one set of tokens with both decoders: turbo above, normal below.\n\n"
        "Turbo takes 8 rounds, normal 49 double ones, over ten times as long. The composition is the tokens' and "
        "so the same; compare fine detail.\n\n"
        "The tokens are also saved, a few kB. Load Image Tokens brings them back without sampling again."
    )
    return [
        start("turbo-and-normal", model, text),
        Column([sample], "What to draw", GREEN),
        Column([*decodes, keep], "Tokens to pixels, and to a file", PURPLE),
        Column(saves, "Compare", BLUE),
    ]


def story() -> list[Column]:
    """Text and pictures in turn."""
    model = loader()
    tell = Box("LLaDAUniInterleave", {"model": model, "instruction": STORY})
    decode = Box("LLaDAUniDecode", {"model": model, "tokens": tell}, after="randomize")
    words = Box("PreviewAny", {"source": (tell, "text")}, title="The story", height=440)
    save = Box("SaveImage", {"images": decode, "filename_prefix": "llada-uni/story"}, title="Its pictures")
    text = (
        "Writes a story with pictures. Text and images take turns until the model ends it or **max_images** are "
        "drawn.\n\n"
        "The text marks the place of each picture: [image 1], [image 2] and so on, in the order of the saved files.\n\n"
        "The model chooses the size of each picture itself."
    )
    return [
        start("story", model, text),
        Column([tell], "What to tell", GREEN),
        Column([words], "The story", GREY),
        Column([decode, save], "Tokens to pixels, and its pictures", BLUE),
    ]


def miniature() -> list[Column]:
    """Draw, edit and ask with the checkpoint that comes with the pack."""
    model = Box("LLaDAUniLoader", {"checkpoint": "miniature"})
    size = {"width": 256, "height": 256}
    prompt = "a large blue star above a small red diamond on a black background"
    sample = Box("LLaDAUniSample", {"model": model, "prompt": prompt, **size}, title="Sample: draw", height=654)
    change = {"model": model, "prompt": "make the blue star yellow", "guidance": 4.0, "references": sample, **size}
    edit = Box("LLaDAUniSample", change, title="Sample: edit", height=654)
    decodes = [Box("LLaDAUniDecode", {"model": model, "tokens": tokens}, height=450) for tokens in (sample, edit)]
    question = "Describe the picture."
    ask = Box("LLaDAUniImageQA", {"model": model, "question": question, "image": decodes[1]}, height=336)
    saves = [
        Box(
            "SaveImage",
            {"images": decode, "filename_prefix": f"llada-uni/miniature-{name}"},
            name.capitalize(),
            height=281,
        )
        for decode, name in zip(decodes, ("drawn", "edited"), strict=True)
    ]
    answer = Box("PreviewAny", {"source": ask}, title="Answer", height=100)
    text = (
        "**Nothing to download:** the miniature comes with the pack and takes seconds on any machine. Queue this.\n\n"
        "It draws a picture, edits its tokens without decoding them in between, and asks about the result.\n\n"
        "It knows one small world: one to three objects (circle, square, triangle, diamond, star), large or small, in "
        "eight colours, left, right, above, below or in the centre, on a plain background; 256x256, or 256 wide and "
        "192 high. Ask for a cat and you get shapes. It was taught one way of saying things; these work:\n\n"
        "- *draw:* a small green circle to the left of a large red square on a white background\n"
        "- *edit:* make the blue star yellow; move the blue star to the left; remove the red diamond\n"
        "- *ask:* Describe the picture. What colour is the star? How many objects are there?\n"
        "- *tell:* Tell a story: a large purple diamond on the left on a white background moves to the centre and then "
        "to the right."
    )
    return [
        Column([note("What this does", text), model], "Start here", GREY),
        Column([sample, decodes[0]], "Draw", GREEN),
        Column([edit, decodes[1]], "Then change", PURPLE),
        Column([*saves, ask, answer], "Results, and ask", BLUE),
    ]


WORKFLOWS = {
    "miniature": miniature,
    "text-to-image": text_to_image,
    "thinking-text-to-image": thinking_text_to_image,
    "edit": edit,
    "edit-two-references": edit_two_references,
    "image-qa": image_qa,
    "sprint-side-by-side": sprint_side_by_side,
    "turbo-and-normal": turbo_and_normal,
    "story": story,
    **token_workflows.WORKFLOWS,
    **decoder_workflows.WORKFLOWS,
}


# Node -> the workflow its help page shows it in; None: the small one below.
HELP = {
    "LLaDAUniLoader": "text-to-image",
    "LLaDAUniEncode": "edit",
    "LLaDAUniSample": "text-to-image",
    "LLaDAUniSampling": "thinking-text-to-image",
    "LLaDAUniSprint": "sprint-side-by-side",
    "LLaDAUniDecode": "text-to-image",
    "LLaDAUniImageQA": "image-qa",
    "LLaDAUniInterleave": "story",
    "LLaDAUniJoinTokens": "edit-two-references",
    "LLaDAUniSaveTokens": "turbo-and-normal",
    "LLaDAUniLoadTokens": None,
    **token_workflows.HELP,
    **decoder_workflows.HELP,
}


def saved_tokens() -> list[Column]:
    """Tokens from a file to a picture: drawn for a help page, not shipped, as no machine has the file."""
    model, tokens = loader(), Box("LLaDAUniLoadTokens", {"file": "tokens/llada_00001_.safetensors"})
    decode = Box("LLaDAUniDecode", {"model": model, "tokens": tokens})
    return [Column([model, tokens]), Column([decode]), Column([Box("SaveImage", {"images": decode})])]


# Node -> the workflow of its help page where that is not a shipped one.
UNSHIPPED = {"LLaDAUniLoadTokens": saved_tokens, **token_workflows.UNSHIPPED}


def build() -> dict[str, Workflow]:
    """Every shipped workflow, by name."""
    schemas = everything()
    return {name: Workflow(name, columns(), schemas) for name, columns in WORKFLOWS.items()}


def files(workflows: dict[str, Workflow]) -> dict[Path, str]:
    """The text of every file to write, by path."""
    found = {}
    for name, workflow in workflows.items():
        for path, data in ((OUT / f"{name}.json", workflow.graph()), (OUT / "api" / f"{name}.json", workflow.api())):
            found[path] = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    return found


def help_pictures(workflows: dict[str, Workflow]) -> dict[Path, Image.Image]:
    """The picture of each node's help page, by path."""
    found = {}
    for kind, name in HELP.items():
        shown = workflows[name] if name else Workflow("help", UNSHIPPED[kind](), everything())
        found[ROOT / "web" / "docs" / f"{kind}.png"] = draw_help(shown, kind)
    return found


def save_thumbnail(workflow: Workflow, shown: Pictures) -> None:
    """Draw a workflow's thumbnail into its file."""
    draw_thumbnail(workflow, shown).save(OUT / f"{workflow.name}.jpg", quality=90, subsampling=0, optimize=True)


def main() -> None:
    """Write everything."""
    workflows = build()
    for path, text in (files(workflows) | blueprints.files(everything())).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as base:
        host = InProcessHost(Path(base))
        for name in workflows.keys() - decoder_workflows.WORKFLOWS.keys():
            shown = pictures_of(workflows[name], run(host, name, workflows[name].api())[1])
            save_thumbnail(workflows[name], shown)
    comfyui = find_comfyui()
    if comfyui is not None and knows_zimage(comfyui):
        with tempfile.TemporaryDirectory() as base, ComfyServer(comfyui, Path(base)) as server:
            for name in decoder_workflows.WORKFLOWS:
                save_thumbnail(workflows[name], pictures_on_server(server, workflows[name]))
    else:
        print("The decoder's workflows keep their thumbnails: they are drawn on a ComfyUI that knows Z-Image.")
    for path, picture in help_pictures(workflows).items():
        picture.save(path, optimize=True)
    print(f"{len(workflows)} workflows and {len(HELP)} help pictures written")


if __name__ == "__main__":
    main()
