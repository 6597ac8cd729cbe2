"""The workflows around the decoder as one of ComfyUI's own models, for hosts that know Z-Image."""

from .graph_forms import Box, Column
from .workflow_parts import BLUE, FOX, GREEN, PURPLE, STREET, loader, start

TURBO = {"steps": 8, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple"}
NORMAL = {"steps": 49, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple"}
SHOWN = 340  # height of a box that shows a picture beside many others
CHANGE = "Make it a winter day with deep snow, keep everything else as it is"


def decoder(model: Box, kind: str) -> tuple[Box, Box]:
    """Load Decoder, and what samples with it: the same, or behind Decoder Guidance where it is the normal one."""
    loaded = Box("LLaDAUniDecoderModel", {"model": model, "decoder": kind}, title=f"Load Decoder, {kind}")
    return loaded, loaded if kind == "turbo" else Box("LLaDAUniDecoderGuidance", {"model": (loaded, "decoder")})


def conditioning(model: Box, tokens: Box) -> Box:
    """Tokens to Conditioning."""
    return Box("LLaDAUniConditioning", {"model": model, "tokens": tokens})


def sampled(model: Box, given: Box, latent: Box | tuple[Box, str], settings: dict, title: str = "") -> Box:
    """KSampler with the two sides of a conditioning."""
    sides = {side: (given, side) for side in ("positive", "negative")}
    inputs = {"model": model, **sides, "latent_image": latent, "denoise": 1.0, **settings}
    return Box("KSampler", inputs, title=title)


def pixels(latents: Box, loaded: Box) -> Box:
    """VAE Decode with the VAE of Load Decoder."""
    return Box("VAEDecode", {"samples": latents, "vae": (loaded, "vae")})


def saved(images: Box, name: str, title: str = "", height: int = SHOWN) -> Box:
    """Save Image."""
    return Box("SaveImage", {"images": images, "filename_prefix": f"llada-uni/{name}"}, title=title, height=height)


def edited(model: Box, picture: Box) -> tuple[Box, Box]:
    """A picture's tokens, and those of the changed picture."""
    encode = Box("LLaDAUniEncode", {"model": model, "image": picture})
    inputs = {"model": model, "prompt": CHANGE, "guidance": 4.0, "references": encode}
    return encode, Box("LLaDAUniSample", inputs)


def fitted(image: Box, given: Box, method: str) -> Box:
    """A picture at the size and in the proportions of the tokens' own."""
    inputs = {"image": image, "upscale_method": method, "crop": "center"}
    return Box("ImageScale", inputs | {side: (given, side) for side in ("width", "height")})


def with_ksampler() -> list[Column]:
    """Turbo and normal from one set of tokens through stock samplers."""
    model = loader()
    sample = Box("LLaDAUniSample", {"model": model, "prompt": STREET})
    given = conditioning(model, sample)
    turbo, _ = decoder(model, "turbo")
    normal, guided = decoder(model, "normal")
    levels = Box("LLaDAUniDecoderSchedule", {"model": guided})
    euler = Box("KSamplerSelect", {"sampler_name": "euler"})
    fast = sampled(turbo, given, (given, "latent"), TURBO, "KSampler, turbo")
    inputs = {"model": guided, "cfg": 2.0, "sampler": euler, "sigmas": levels, "latent_image": (given, "latent")}
    sides = {side: (given, side) for side in ("positive", "negative")}
    fine = Box("SamplerCustom", inputs | sides, title="SamplerCustom, normal")
    text = (
        "Decodes one set of tokens with ComfyUI's own samplers: turbo above, normal below. With the same seed the "
        "pictures are those of Semantic-Token Decode.\n\n"
        "**Load Decoder** makes the decoder a MODEL, so that all that ComfyUI has for models works: other samplers, "
        "LoRA, ControlNet, masks, a picture to start from.\n\n"
        "**Turbo:** 8 steps, cfg 1, lcm, simple. **Normal:** 49 steps, cfg 2, euler, behind Decoder Guidance; Decoder "
        "Schedule gives its noise levels for any number of steps."
    )
    drawn = [pixels(latents, turbo) for latents in (fast, fine)]
    names = ("turbo", "normal")
    saves = [saved(picture, f"ksampler-{name}", name.capitalize()) for picture, name in zip(drawn, names, strict=True)]
    return [
        start("decoder-with-ksampler", model, text, turbo, normal, guided, levels),
        Column([sample, given, euler], "What to draw", GREEN),
        Column([fast, fine], "Turbo above, normal below", PURPLE),
        Column([drawn[0], saves[0], drawn[1], saves[1]], "Compare", BLUE),
    ]


def keeps_the_photo() -> list[Column]:
    """An edit that starts from the photo's own latents."""
    model = loader()
    picture = Box("LoadImage", {"image": "example.png"})
    encode, sample = edited(model, picture)
    given = conditioning(model, sample)
    normal, guided = decoder(model, "normal")
    photo = fitted(picture, given, "lanczos")
    start_from = Box("VAEEncode", {"pixels": photo, "vae": (normal, "vae")})
    draw = sampled(guided, given, start_from, NORMAL | {"steps": 34, "denoise": 0.7})
    result = pixels(draw, normal)
    text = (
        "Changes a photo as the prompt says and keeps what tokens forget: the change comes from the tokens, the rest "
        "from the photo's own latents.\n\n"
        "**denoise** in KSampler says how far it goes: 0.6 keeps more of the photo, 0.8 follows the tokens more. With "
        "it change steps: 49 times denoise.\n\n"
        "The photo is cut and scaled to the size of the edited picture, as SigLIP-VQ Encode has done for its tokens."
    )
    return [
        start("edit-keeps-the-photo", model, text, picture),
        Column([encode, sample], "What to change", GREEN),
        Column([given, normal, guided, photo, start_from], "Start from the photo", PURPLE),
        Column([draw, result, saved(result, "keeps-the-photo")], "Result", BLUE),
    ]


def in_a_mask() -> list[Column]:
    """An edit of a masked part; every other pixel is the photo's."""
    model = loader()
    picture = Box("LoadImage", {"image": "example.png"}, title="Photo and mask")
    encode, sample = edited(model, picture)
    given = conditioning(model, sample)
    turbo, _ = decoder(model, "turbo")
    photo = fitted(picture, given, "lanczos")
    as_image = Box("MaskToImage", {"mask": (picture, "MASK")})
    cut = fitted(as_image, given, "bilinear")
    mask = Box("ImageToMask", {"image": cut, "channel": "red"}, title="Mask, fitted")
    start_from = Box("VAEEncode", {"pixels": photo, "vae": (turbo, "vae")})
    masked = Box("SetLatentNoiseMask", {"samples": start_from, "mask": mask})
    draw = sampled(turbo, given, masked, TURBO)
    drawn = pixels(draw, turbo)
    inputs = {"destination": photo, "source": drawn, "x": 0, "y": 0, "resize_source": False, "mask": mask}
    result = Box("ImageCompositeMasked", inputs, title="Only the mask")
    text = (
        "Changes a part of a photo. **Paint the part:** right-click the picture, *Open in MaskEditor*. Nothing painted "
        "is nothing changed.\n\n"
        "Only the masked latents are drawn, and only masked pixels are taken into the result: every other pixel is the "
        "photo's own, to the last bit, at the size of the edited picture.\n\n"
        "The prompt may speak of the whole picture; what it changes elsewhere is left out."
    )
    return [
        start("edit-in-a-mask", model, text, picture),
        Column([encode, sample], "What to change", GREEN),
        Column([given, turbo, photo, as_image, cut, mask, start_from, masked], "Photo and mask at its size", PURPLE),
        Column([draw, drawn, result, saved(result, "in-a-mask", height=284)], "Draw in the mask", BLUE),
    ]


def larger() -> list[Column]:
    """Twice as large as the decoder was trained for."""
    model = loader()
    sample = Box("LLaDAUniSample", {"model": model, "prompt": FOX})
    given = conditioning(model, sample)
    turbo, _ = decoder(model, "turbo")
    first = sampled(turbo, given, (given, "latent"), TURBO, "First, at the trained size")
    twice = Box("LatentUpscaleBy", {"samples": first, "upscale_method": "bicubic", "scale_by": 2.0})
    places = {"scale_x": 0.5, "scale_y": 0.5}
    near = Box("ScaleROPE", {"model": turbo, **places}, title="Every place beside its token")
    refine = {"steps": 4, "sampler_name": "euler", "denoise": 0.3}
    second = sampled(near, given, twice, TURBO | refine, "Then refine")
    result = pixels(second, turbo)
    text = (
        "Draws at the size that the decoder was trained for, enlarges the latents and refines them with the same "
        "tokens.\n\n"
        "ScaleROPE lets the larger picture cover the places of the smaller one, so that each place still lies beside "
        "its own tokens. Keep its scales at 1 divided by **scale_by**.\n\n"
        "**denoise** of the second sampler: more draws more detail and strays further from the tokens."
    )
    return [
        start("larger", model, text, turbo),
        Column([sample, given], "What to draw", GREEN),
        Column([first, twice, near], "Draw, enlarge, refine", PURPLE),
        Column([second, result, saved(result, "larger")], "Result", BLUE),
    ]


def with_lora() -> list[Column]:
    """A LoRA of Z-Image on the decoder."""
    model = loader()
    sample = Box("LLaDAUniSample", {"model": model, "prompt": FOX})
    given = conditioning(model, sample)
    turbo, _ = decoder(model, "turbo")
    inputs = {"model": (turbo, "decoder"), "lora_name": "z-image-lora.safetensors", "strength_model": 0.8}
    lora = Box("LoraLoaderModelOnly", inputs)
    draw = sampled(lora, given, (given, "latent"), TURBO)
    result = pixels(draw, turbo)
    text = (
        "Draws with a LoRA on the decoder. **Choose one** from models/loras; the name here is only an example.\n\n"
        "The decoder is Z-Image's architecture with other weights and no text: a LoRA that was trained on this decoder "
        "does what it was trained for, one for Z-Image itself at best changes the style.\n\n"
        "Files with the names of diffusers, of Z-Image's release and of kohya's trainer are read."
    )
    return [
        start("with-lora", model, text, turbo, lora),
        Column([sample, given], "What to draw", GREEN),
        Column([draw], "Draw", PURPLE),
        Column([result, saved(result, "with-lora")], "Result", BLUE),
    ]


WORKFLOWS = {
    "decoder-with-ksampler": with_ksampler,
    "edit-keeps-the-photo": keeps_the_photo,
    "edit-in-a-mask": in_a_mask,
    "larger": larger,
    "with-lora": with_lora,
}
HELP = {
    "LLaDAUniDecoderModel": "with-lora",
    "LLaDAUniConditioning": "with-lora",
    "LLaDAUniDecoderGuidance": "edit-keeps-the-photo",
    "LLaDAUniDecoderSchedule": "decoder-with-ksampler",
}
