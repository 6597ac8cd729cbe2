"""Hosts for tests and the demo: a real ComfyUI server, or the nodes in this process."""
