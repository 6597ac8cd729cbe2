"""Small API graphs for the node tests."""


def node(kind: str, **inputs) -> dict:
    """One node of an API graph."""
    return {"class_type": kind, "inputs": inputs}


def loader() -> dict:
    """Load the tiny checkpoint."""
    return node("LLaDAUniLoader", checkpoint="tiny", precision="auto", attention="auto")


def draw(side: int = 64, prompt: str = "a red fox", **sample) -> dict:
    """Load, sample, decode, save: nodes "load", "sample", "decode", "save"."""
    options = {"steps": 8, "guidance": 2.0, "seed": 1, "thinking": False} | sample
    return {
        "load": loader(),
        "sample": node("LLaDAUniSample", model=["load", 0], prompt=prompt, width=side, height=side, **options),
        "decode": node("LLaDAUniDecode", model=["load", 0], tokens=["sample", 0], turbo=True, steps=2, seed=3),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
    }


def think_long() -> dict:
    """A graph that runs for minutes: thinking to the limit of the context."""
    graph = draw(thinking=True, sampling=["options", 0])
    graph["options"] = node(
        "LLaDAUniSampling",
        block_length=32,
        threshold=1.0,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        guidance_rescale=0.7,
        image_guidance=0.0,
        thinking_steps=32,
        thinking_length=8000,
    )
    return graph
