"""The workflows that treat tokens as a canvas: a part drawn anew, a larger picture, variations."""

from .graph_forms import Box, Column
from .workflow_parts import BLUE, FOX, GREEN, GREY, PURPLE, loader, start


def edit_a_part() -> list[Column]:
    """A painted part drawn anew; every other token stays."""
    model = loader()
    picture = Box("LoadImage", {"image": "example.png"}, title="Picture and mask")
    encode = Box("LLaDAUniEncode", {"model": model, "image": picture})
    prompt = "Put a red umbrella there, keep everything else as it is"
    inputs = {"model": model, "prompt": prompt, "guidance": 4.0, "references": encode, "mask": (picture, "MASK")}
    sample = Box("LLaDAUniSample", inputs)
    decode = Box("LLaDAUniDecode", {"model": model, "tokens": sample}, after="randomize")
    save = Box("SaveImage", {"images": decode, "filename_prefix": "llada-uni/edit-a-part"})
    text = (
        "Draws a part of a picture anew. **Paint the part:** right-click the picture, *Open in MaskEditor*. Nothing "
        "painted is nothing changed.\n\n"
        "Every token that the mask touches is drawn, all others stay as they are, and only blocks with something to "
        "draw take time.\n\n"
        "The decoder draws all pixels from tokens, so fine detail elsewhere may differ from the photo."
    )
    return [
        start("edit-a-part", model, text),
        Column([picture, encode], "Picture and mask, to tokens", PURPLE),
        Column([sample], "What to draw there", GREEN),
        Column([decode, save], "Tokens to pixels, and the result", BLUE),
    ]


def outpaint() -> list[Column]:
    """A picture on a larger canvas."""
    model = loader()
    picture = Box("LoadImage", {"image": "example.png"})
    encode = Box("LLaDAUniEncode", {"model": model, "image": picture})
    pad = Box("LLaDAUniPadTokens", {"tokens": encode, "left": 256, "right": 256})
    prompt = "A wide view of a small figure on a quiet street, houses on both sides, soft daylight"
    inputs = {"model": model, "prompt": prompt, "tokens": (pad, "tokens"), "mask": (pad, "mask")}
    sample = Box("LLaDAUniSample", inputs)
    decode = Box("LLaDAUniDecode", {"model": model, "tokens": sample}, after="randomize")
    save = Box("SaveImage", {"images": decode, "filename_prefix": "llada-uni/outpaint"})
    text = (
        "Draws what lies beyond the edges of a picture. **Pad** says how far, in pixels of the result; what is known "
        "stays where it stood, token for token.\n\n"
        "**Describe the whole picture**, the known part too: a block of tokens sees what stands above and beside it, "
        "not what stands below. Or connect the encoded picture to references, with guidance 4: then all blocks see it."
        "\n\n"
        "The decoder was trained on pictures of about 1024x1024 pixels; much larger ones lose detail."
    )
    return [
        start("outpaint", model, text),
        Column([picture, encode, pad], "To tokens, with room around", PURPLE),
        Column([sample], "What lies there", GREEN),
        Column([decode, save], "Tokens to pixels, and the result", BLUE),
    ]


def four_variations() -> list[Column]:
    """One picture and four variations of it."""
    model = loader()
    sample = Box("LLaDAUniSample", {"model": model, "prompt": FOX})
    vary = Box("LLaDAUniVary", {"model": model, "tokens": sample, "prompt": FOX}, after="randomize")
    decode = Box("LLaDAUniDecode", {"model": model, "tokens": vary})
    save = Box("SaveImage", {"images": decode, "filename_prefix": "llada-uni/variation"}, title="The variations")
    grid = Box("LLaDAUniPreviewTokens", {"model": model, "tokens": vary})
    shown = Box("PreviewImage", {"images": grid}, title="Their tokens", height=254)
    text = (
        "Draws a picture, then four variations of it at once: a share of its tokens is masked again and drawn, the "
        "others stay.\n\n"
        "**strength** is that share. **choose** takes tokens anywhere, or those that the model is least sure of.\n\n"
        "**Write the same prompt in both.** Another seed gives other variations; the picture is kept."
    )
    return [
        start("four-variations", model, text),
        Column([sample], "What to draw", GREEN),
        Column([vary, grid, shown], "Variations, and their tokens", GREY),
        Column([decode, save], "Tokens to pixels, and the results", BLUE),
    ]


def collage() -> list[Column]:
    """A part of one picture laid over another: drawn for help pages, not shipped."""
    model = loader()
    pictures = [Box("LoadImage", {"image": "example.png"}) for _ in range(2)]
    below, other = (Box("LLaDAUniEncode", {"model": model, "image": picture}) for picture in pictures)
    piece = Box("LLaDAUniCropTokens", {"tokens": other})
    paste = Box("LLaDAUniPasteTokens", {"tokens": below, "piece": piece})
    decode = Box("LLaDAUniDecode", {"model": model, "tokens": (paste, "tokens")})
    return [
        Column([model, *pictures]),
        Column([below, other, piece]),
        Column([paste, decode]),
        Column([Box("SaveImage", {"images": decode})]),
    ]


WORKFLOWS = {"edit-a-part": edit_a_part, "outpaint": outpaint, "four-variations": four_variations}
HELP = {
    "LLaDAUniPadTokens": "outpaint",
    "LLaDAUniVary": "four-variations",
    "LLaDAUniPreviewTokens": "four-variations",
    "LLaDAUniCropTokens": None,
    "LLaDAUniPasteTokens": None,
}
UNSHIPPED = {"LLaDAUniCropTokens": collage, "LLaDAUniPasteTokens": collage}
