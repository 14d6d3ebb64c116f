"""python -m skyrl_gym check my_module:MyEnv"""

import sys

from skyrl_gym.commands import main

if __name__ == "__main__":
    sys.exit(main())
