"""The records of a run beside its checkpoints: trajectories, report, summary."""
