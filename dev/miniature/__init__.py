"""A trained miniature of LLaDA2.0-Uni: a drawn world, and the code that trains every part on it from nothing.

Neither the engine nor the nodes import this package.
"""
