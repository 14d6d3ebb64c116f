"""The commands of `python -m integrations.openenv`, a file each with `add_arguments` and `run` (returns exit code).

watch.py is the part of `play` in which a model plays.
"""
