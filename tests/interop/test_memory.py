"""Converting a checkpoint takes the memory of its largest quantized tensor, whatever the shard or the model is."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import microscale as ms
from microscale.interop.checkpoint import Checkpoint
from microscale.interop.safetensors_stream import StreamWriter, TensorSpec

MB = 2**20
WEIGHT = TensorSpec("BF16", (2048, 2048))
TEMPORARIES = 64 * MB  # of the reference kernel, which works in chunks of 2**20 values; no function of sizes
BOUND = 3 * WEIGHT.nbytes + TEMPORARIES
# Not quantized and larger than the bound by itself: it has to pass through.
EMBEDDING = TensorSpec("BF16", (BOUND // 2048 + 1, 1024))

CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import microscale as ms
def status(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
warm, src, dst, recipe = sys.argv[1:]
ms.quantize_checkpoint(warm, dst + "-warm", recipe)  # imports, caches, allocator
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = status("VmRSS")
ms.quantize_checkpoint(src, dst, recipe)
print(status("VmHWM") - before)
"""


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not outlive the test: it holds most of a gigabyte."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def write_large(folder: Path, weight: torch.Tensor) -> Path:
    """Two shards, each above the bound, without holding either."""
    folder.mkdir()
    index = {}
    data = weight.reshape(-1).view(torch.uint8).numpy().data
    for shard in (1, 2):
        specs = {f"layers.{shard}.{i}.weight": WEIGHT for i in range(15)}
        specs |= {"embed_tokens.weight": EMBEDDING} if shard == 1 else {}
        file = f"model-0000{shard}-of-00002.safetensors"
        with StreamWriter(folder / file, specs, {"format": "pt"}) as out:
            for name, spec in specs.items():
                repeats, rest = divmod(spec.nbytes, len(data))
                out.write_chunks(name, [data] * repeats + [data[:rest]])
        index |= dict.fromkeys(specs, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_peak_memory_is_bounded_by_the_largest_tensor(scratch, write_checkpoint):
    weight = torch.randn(WEIGHT.shape, dtype=torch.bfloat16)
    warm = write_checkpoint(scratch / "warm", {"a.weight": weight[:600].clone()})
    source = write_large(scratch / "src", weight)
    total = Checkpoint(source).nbytes
    assert total > 3 * BOUND
    assert all(file.path.stat().st_size > BOUND for file in Checkpoint(source).files)
    command = [sys.executable, "-c", CHILD, warm, source, scratch / "out", "nvfp4_weight_only"]
    # What is measured is live memory, not how glibc keeps freed blocks: large ones go back at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MB)}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    grown = int(run.stdout)
    sizes = f"{grown / MB:.0f} MB for weights of {WEIGHT.nbytes / MB:.0f} MB, in a model of {total / MB:.0f} MB"
    print(sizes)
    assert grown < BOUND, sizes
    found = Checkpoint(scratch / "out").read("layers.2.7.weight")
    assert torch.equal(found.qdata, ms.quantize(weight, "nvfp4").qdata)
