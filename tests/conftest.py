"""Settings of the whole suite: CPU, eight virtual devices, shared compiled programs."""

import os
from pathlib import Path

# Before JAX starts.
os.environ["JAX_PLATFORMS"] = "cpu"
# Code that runs for microseconds is not worth optimising: compiling is what takes the time here.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# Workers, and programs that the tests start, compile each program once.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def float64():
    """64-bit arithmetic, so that agreement can be asked for to almost the last digit."""
    with jax.enable_x64(True):
        yield


def pytest_addoption(parser):
    parser.addoption("--write-golden", action="store_true", help="renew tests/golden after an intended change")


@pytest.fixture
def write_golden(request) -> bool:
    return request.config.getoption("--write-golden")
