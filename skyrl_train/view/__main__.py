"""Look at runs in the browser: `python -m skyrl_train.view FOLDER`."""

from __future__ import annotations

import sys

from skyrl_train.view.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
