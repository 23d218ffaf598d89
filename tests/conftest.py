"""What all tests share: `pytest -n 2` runs files side by side, each on one CPU thread."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before PyTorch is loaded, and for the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"
