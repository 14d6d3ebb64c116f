"""Walls: sandboxes and memory limits for programs that a model writes and for the workers of environment servers."""
