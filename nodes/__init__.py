"""The ComfyUI wing: each node is its schema and a call into the engine."""
