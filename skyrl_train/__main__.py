"""`python -m skyrl_train COMMAND`: the command `skyrl`."""

import sys

from skyrl_train.commands.main import program

if __name__ == "__main__":
    sys.exit(program())
