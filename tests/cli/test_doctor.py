"""`doctor` finds what is broken, says how to mend it, and checks bytes that this library did not compute."""

import numpy as np
import pytest
from oracles import specmodel

import microscale as ms
from microscale import dispatch
from microscale.cli import doctor


def stored_bytes(name):
    """Codes (a little-endian bit stream), scales and outer scale of the probe by the numpy model, in hex."""
    spec = ms.find_format(name)
    rule = spec.scale_rule.base if spec.scale.exponent_only else None
    q = specmodel.quantize(np.array([doctor.PROBE], np.float32), name, rule)
    stream = sum(int(code) << (i * spec.element.width) for i, code in enumerate(q.codes[0]))
    packed = stream.to_bytes(len(doctor.PROBE) * spec.element.width // 8, "little")
    table = list(spec.scale.table)
    scales = bytes(table.index(float(s)) for s in q.scales[0])
    return (packed + scales + (b"" if q.outer is None else np.float32(q.outer).tobytes())).hex()


@pytest.mark.parametrize("name", doctor.GOLDEN)
def test_the_golden_bytes_are_those_of_the_numpy_model(name):
    assert doctor.GOLDEN[name] == stored_bytes(name)


def test_healthy(run, run_json):
    data = run_json("doctor")
    assert data["healthy"] is True
    found = {check["name"]: check for check in data["checks"]}
    assert {"python", "torch", "triton", "device cpu", "self-check on cpu", "formats", "recipes"} <= set(found)
    assert {row["op"] for row in data["kernels"]} == {k.op for k in dispatch.kernels()}
    assert all(row["usable"] for row in data["kernels"] if row["kernel"].startswith("reference."))
    assert "everything works" in run("doctor").stdout


def test_wrong_bytes_are_broken(run, run_json, monkeypatch):
    monkeypatch.setitem(doctor.GOLDEN, "mxfp4", "00")
    data = run_json("doctor", code=1)
    assert data["healthy"] is False
    broken = [c for c in data["checks"] if c["status"] == "broken"]
    assert broken[0]["name"] == "self-check on cpu"  # and on a GPU where there is one
    assert all("mxfp4 gave the bytes" in c["detail"] for c in broken)
    assert "broken: see the lines" in run("doctor", code=1).stdout


def test_a_missing_required_package_is_broken(run_json, monkeypatch):
    monkeypatch.setattr(doctor, "REQUIRED", (*doctor.REQUIRED, "no-such-package"))
    data = run_json("doctor", code=1)
    (broken,) = [c for c in data["checks"] if c["status"] == "broken"]
    assert (broken["name"], broken["hint"]) == ("no-such-package", "pip install no-such-package")


def test_a_missing_optional_package_is_only_absent(run_json, monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", {**doctor.OPTIONAL, "no-such-package": "nothing"})
    data = run_json("doctor")
    assert [c["detail"] for c in data["checks"] if c["name"] == "no-such-package"] == ["not installed; for nothing"]


def test_a_format_that_does_not_load_is_named(run_json, monkeypatch):
    monkeypatch.setattr(doctor, "list_formats", lambda: ["mxfp4", "nowhere"])
    broken = [c for c in run_json("doctor", code=1)["checks"] if c["status"] == "broken"]
    assert broken[0]["name"] == "formats"
    assert "unknown format 'nowhere'" in broken[0]["detail"]
