"""What a run leaves behind beside its checkpoints: trajectories, report, summary; and the rules of its folder."""
