"""The commands of `python -m integrations.openenv`, a file each with `add_arguments` and `run` (returns exit code)."""
