"""The command that shows what a run has kept; the code is in run/records."""
