import os
import sys

# Set before torch is imported: results in float32 depend on the number of threads, and a fork after OpenMP has
# started its pool can hang.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

# Set before Triton is imported, where kernels have no other place to run
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

# How long an example takes says how busy the machine is
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def pytest_configure(config):
    """Warnings are errors, but for those that a machine gives whatever the code does."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores == 1:
        config.addinivalue_line("filterwarnings", "ignore:This DataLoader will create")
    if sys.version_info[:3] == (3, 13, 0):
        config.addinivalue_line("filterwarnings", "ignore:Guards may run slower on Python 3.13.0")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
