"""Plan, quantize, run, save and load a model: python examples/quantize_model.py [RECIPE]

RECIPE is a name (`microscale recipes` lists them) or the path of a recipe's YAML.
"""

import sys
import tempfile
from pathlib import Path

import torch

import microscale as ms


def make_model() -> torch.nn.Sequential:
    """A small network; any nn.Module with nn.Linear or nn.Embedding layers will do."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(256, 1024),
        torch.nn.GELU(),
        torch.nn.Linear(1024, 1024),
        torch.nn.GELU(),
        torch.nn.Linear(1024, 256),
    ).to(torch.bfloat16)


def main(recipe: str = "nvfp4_dynamic") -> None:
    model = make_model()
    x = torch.randn(32, 256, dtype=torch.bfloat16)
    before = model(x).float()

    print(ms.plan(model, recipe))  # what would happen, layer by layer; nothing is touched
    ms.quantize_(model, recipe, calibrate=[x])  # calibrate is used by static recipes only

    with torch.no_grad():
        after = model(x).float()
    print(f"\noutput error {((after - before).norm() / before.norm()).item():.2%}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized"
        ms.save(model, path)
        again = ms.load(path, make_model())  # the plain model takes on what the checkpoint says
        with torch.no_grad():
            print(f"loaded model gives the same bits: {torch.equal(model(x), again(x))}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
