"""The subcommands of `skyrl`, a module each with `main(words) -> exit status`. main.py is their table."""
