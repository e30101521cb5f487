"""Training with torch's DistributedDataParallel and fully_shard, in two processes, against the same by hand."""

import pytest
import torch
import torch.distributed as dist

from tests.kernels.processes import lines

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch build has no gloo"
)


@pytest.fixture(scope="module", params=["mxfp8_train", "nvfp4_train"])
def found(request):
    """What the two processes said, by case; ten seconds for all of them."""
    return {row["case"]: row for row in lines("tests.nn.distributed_cases", request.param, timeout=120)}


def test_ddp_averages_the_gradients_of_each_process(found):
    row = found["ddp"]
    assert row["equal"] and row["compared"] == 2 * 9
    assert row["offsets"] == row["by_hand"]  # both drew the same numbers


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_trains_like_one_model(found, reshard):
    row = found[f"fsdp, reshard={reshard}"]
    assert row["losses"] and row["grads"] and row["weights"] and row["evaluated"]
    assert row["offsets"] == row["by_hand"]


def test_fsdp_in_mixed_precision(found):
    assert found["fsdp bf16"]["equal"] and found["fsdp bf16"]["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_sees_weights_that_no_optimizer_changed(found, reshard):
    """A checkpoint loaded between evaluations: FSDP gathers into the same memory without bumping its version."""
    assert found[f"fsdp changed, reshard={reshard}"]["equal"]


def test_main_grads_are_averaged_by_hand(found):
    """Without a wrapper, or with DistributedDataParallel told to leave those weights alone."""
    assert found["main_grad by hand"]["equal"]
    assert found["main_grad beside ddp"]["equal"] and not found["main_grad beside ddp"]["error"]


def test_main_grads_that_nobody_would_reduce_are_refused(found):
    assert "DistributedDataParallel does not reduce weight.main_grad" in found["main_grad in ddp"]["error"]
    assert "fully_shard cannot reduce weight.main_grad" in found["main_grad in fsdp"]["error"]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["mxfp8_train", "nvfp4_train"])
def test_on_two_gpus(recipe):
    """All of the above over NCCL. Sums of two are the same in any order."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for row in lines("tests.nn.distributed_cases", recipe, "cuda", timeout=240):
        assert all(value for value in row.values() if isinstance(value, bool)), row
        assert row.get("offsets") == row.get("by_hand"), row
        assert "in " not in row["case"] or "main_grad" in row["error"], row
