"""`skyrl config`: `python -m skyrl_train.config` under its shorter name."""


def main(words: list[str]) -> int:
    """Print the keys, and return 1 if none matches."""
    from skyrl_train.config.__main__ import main as print_keys

    return print_keys(words, prog="skyrl config")
