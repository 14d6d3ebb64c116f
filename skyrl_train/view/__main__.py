"""Look at runs in the browser: `python -m skyrl_train.view FOLDER`."""

from __future__ import annotations

import sys

from skyrl_train.signals import ends_when_asked
from skyrl_train.view.command import main

if __name__ == "__main__":
    sys.exit(ends_when_asked(lambda: main(sys.argv[1:])))
