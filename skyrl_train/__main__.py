"""`python -m skyrl_train COMMAND`: the command `skyrl`."""

import sys

from skyrl_train.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
