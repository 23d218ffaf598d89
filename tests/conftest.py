"""What all tests share: `pytest -n 2` runs files side by side, each on one CPU thread."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before PyTorch is loaded, and for the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items):
    """The workflow's tests first: their files take minutes, and one that began last would run alone."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/workflow/"))
