"""`skyrl view`: a local web page that shows runs, their curves and every episode. It only reads run folders."""

from skyrl_train.view.command import main

__all__ = ["main"]
