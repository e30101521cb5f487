"""One YAML is a format: python examples/user_format.py [FORMAT.yaml]

Nothing below knows the format. It goes through quantize, a linear layer, a recipe, compare, save and load.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import microscale as ms

MINE = Path(__file__).with_name("my_format.yaml")


def main(path: str | Path = MINE) -> None:
    (spec,) = ms.register_format(path)  # or give the path wherever a name is expected
    print(f"{spec.name}: {spec.description}, {spec.bits_per_value:g} bits per value")
    print("values", sorted({v for v in ms.decode_table(spec.element).tolist() if v >= 0}))

    torch.manual_seed(0)
    w, x = torch.randn(128, 200), torch.randn(4, 200)  # 200 is no multiple of the block: padded inside
    q = ms.quantize(w, spec.name)
    print(q)
    y = torch.nn.functional.linear(x, q)
    print(f"linear agrees with its dequantized weight: {torch.allclose(y, x @ q.dequantize().T, atol=1e-4)}")

    recipe = {  # activations in a variant of it, with longer blocks
        "name": "mine_dynamic",
        "quantizers": {"w": spec.name, "x": {"format": spec.name, "block": 2 * spec.block}},
        "rules": [{"match": "*", "fprop": {"input": "x", "weight": "w"}}],
    }
    with tempfile.TemporaryDirectory() as folder:
        plain, quantized = Path(folder) / "plain", Path(folder) / "quantized"
        plain.mkdir()
        save_file({"proj.weight": w}, plain / "model.safetensors")
        for row in ms.compare(plain, formats=[spec.name, "mxfp6", "mxfp4"]).formats:
            print(f"{row.format:<12} {row.bits_per_value:5.2f} bits {row.sqnr_db_mean:6.2f} dB")

        ms.quantize_checkpoint(plain, quantized, recipe)
        loaded = ms.load(quantized)["proj.weight"]
        print(f"loaded bytes are the same: {torch.equal(loaded.qdata, q.qdata) and torch.equal(loaded.scale, q.scale)}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
