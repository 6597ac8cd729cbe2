"""LLaDA2.0-Uni for ComfyUI: the entry point that the host looks for."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What the host calls once when it loads the pack: the extension that lists the nodes."""
    from .nodes.extension import LLaDAUniExtension  # here, so that only a host needs comfy_api

    return LLaDAUniExtension()
