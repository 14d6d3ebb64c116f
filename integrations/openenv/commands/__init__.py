"""The commands of `python -m integrations.openenv`, a file each: `add_arguments`; `run` gives the exit code."""
