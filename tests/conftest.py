"""What every test shares: the `gpu` marker, the `device` fixture, hypothesis profiles, one torch thread a worker."""

import os
from collections.abc import Iterator

# Before any test imports transformers: nothing in this suite may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers times threads would oversubscribe the cores

# Laws are checked the same way in every CI run (derandomize), and by new examples on every developer's run.
_COMMON = {
    "deadline": None,  # the first call of a torch op is slow
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
}
hypothesis.settings.register_profile("dev", max_examples=50, **_COMMON)
hypothesis.settings.register_profile("ci", max_examples=50, derandomize=True, database=None, **_COMMON)
hypothesis.settings.register_profile("thorough", max_examples=2000, **_COMMON)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device, and say so."""
    if torch.cuda.is_available():
        return
    why = "this torch build has no CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    skip = pytest.mark.skip(reason=f"needs a CUDA device: {why}")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Run the test on the CPU, and once more on a GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Give every test the same random numbers in every run, whatever ran before it."""
    torch.manual_seed(20251122)


@pytest.fixture
def small_experts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let FP8 tensor cores have experts of any size, which else are slower there."""
    from microscale import dispatch
    from microscale.kernels.cublas import grouped_rows_e4m3

    def forget() -> None:
        dispatch._cache.clear()
        dispatch._by_facts.clear()

    monkeypatch.setattr(grouped_rows_e4m3, "LARGE", 1)
    forget()
    yield
    forget()
