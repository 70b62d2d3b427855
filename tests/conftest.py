"""What every test process needs. Fixtures live beside the tests that use them (`tests/trainers/conftest.py`, ...)."""

import os

import pytest

# Set before torch is imported, and inherited by the processes that tests start.
for _name, _value in {
    "OMP_NUM_THREADS": "1",  # sums in the same order on every machine; several processes share few cores
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",  # or its threads make every fork warn
    "HF_HUB_OFFLINE": "1",  # no test waits for a network
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

from utils.attach import attach  # noqa: E402

attach()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
