"""Training. torch has not been imported yet when this runs, and reads what is set here when it allocates."""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors in pages of 2 MiB: less than half as long to get
