"""Is this checkpoint whole, sound and understood? `python -m llada_core.doctor FOLDER`; see `__main__`."""
