"""Training. torch has not been imported yet when this runs, and reads what is set here when it loads and allocates."""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors in pages of 2 MiB: less than half as long to get
# Waiting threads of OpenMP spin half a millisecond, which covers the pauses between kernels, and then sleep. libgomp's
# default is some 15 ms: beside other work, where the thread that is waited for has no processor, they keep it from one.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# oneDNN keeps a program of about 0.25 MB for every shape of a matmul that it has met; its default is 1024 of them.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
