"""Every command: help with an example, JSON on stdout, what it shows, and how it refuses."""

import re

import jsonschema
import pytest

import microscale as ms
from microscale.cli import output
from microscale.cli.app import COMMANDS
from microscale.spec.schema import KINDS

NAMES = ["formats", "recipes", "compare", "quantize", "inspect", "plan", "explain", "doctor", "bench", "tune", "schema"]


def files_of(folder):
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


class TestHelp:
    def test_the_commands_are_these(self):
        assert list(COMMANDS) == NAMES

    @pytest.mark.parametrize("name", NAMES)
    def test_shows_an_example_of_itself(self, run, name):
        text = run(name, "--help").stdout
        assert f"Example:\n    microscale {name}" in text
        assert "--json" in text

    @pytest.mark.parametrize("name", NAMES)
    def test_the_summary_fits_the_list_of_commands(self, run, name):
        line = next(ln for ln in run("--help").stdout.splitlines() if ln.startswith(f"  {name} "))
        assert not line.endswith("...")

    def test_the_root_has_an_example_and_a_version(self, run):
        assert "Example:\n    microscale plan" in run("--help").stdout
        assert run("--version").stdout == f"microscale {ms.__version__}\n"

    def test_no_arguments_show_the_help(self, run):
        result = run(code=2)
        assert result.stdout == ""
        assert "Commands:" in result.stderr


class TestErrors:
    """Exit code 2, one line, a hint, nothing on stdout."""

    @pytest.mark.parametrize(
        ("arguments", "message", "hint"),
        [
            (["formats", "nvfp5"], "unknown format 'nvfp5'", "did you mean 'nvfp4'"),
            (["formats", "nowhere/x.yaml"], "cannot read nowhere", "known formats"),
            (["formats", "{format: mxfp4, blok: 16}"], "unknown key 'blok'", "did you mean 'block'"),
            (["formats", "{format: [}"], "NAME:1:", "quotes and brackets"),
            (["formats", "--from", "nowhere"], "--from nowhere: no such file", "YAML"),
            (["recipes", "nvfp4"], "unknown recipe 'nvfp4'", "did you mean"),
            (["schema", "formt"], "unknown schema 'formt'", "did you mean 'format'"),
            (["explain", "matmull", "-f", "mxfp4"], "unknown op 'matmull'", "did you mean 'matmul'"),
            (["explain", "matmul", "-f", "mxfp5"], "unknown format 'mxfp5'", "did you mean"),
            (["explain", "matmul", "-f", "mxfp4", "--shape", "4"], "has 1 sizes, matmul needs 3", "MxKxN"),
            (["explain", "matmul", "-f", "mxfp4", "--shape", "axb"], "'axb' is not a shape", "64x4096x11008"),
            (["explain", "matmul", "-f", "mxfp4", "--dtype", "fp64"], "unknown dtype 'fp64'", "bf16"),
            (["explain", "matmul", "-f", "mxfp4", "--device", "tpu"], "unknown device 'tpu'", "use cpu or cuda"),
            (
                ["explain", "matmul", "-f", "mxfp4", "--capability", "9.0"],
                "--capability '9.0' with --device cpu",
                "cuda",
            ),
            (["explain", "matmul", "-f", "mxfp4", "--layout", "swizzled"], "unknown scale layout", "swizzle_32_4_4"),
            (["explain", "matmul", "-f", "mxfp4", "--backend", "referense"], "unknown backend", "reference"),
            (["inspect", "nowhere"], "nowhere", "checkpoint"),
            (["plan", "nowhere", "-r", "mxfp4_dynamic"], "nowhere", "checkpoint"),
            (["quantize", "nowhere", "out", "-r", "mxfp4_dynamic"], "nowhere", "checkpoint"),
            (["compare", "nowhere"], "nowhere", "checkpoint"),
            # usage
            (["formts"], "no such command 'formts'", "microscale --help"),
            (["formats", "--jsn"], "no such option: --jsn", "microscale formats --help"),
            (["plan", "x"], "missing option '--recipe'", "microscale plan --help"),
            (["plan", "-r", "mxfp4_dynamic"], "missing argument", "microscale plan --help"),
            (["formats", "a", "b"], "unexpected extra argument", "microscale formats --help"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_of_the_user(self, run, arguments, message, hint):
        result = run(*arguments, code=2)
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert lines[0].startswith("error: ")
        assert message in lines[0]
        assert len(lines) == 1 if hint is None else lines[1].startswith("  hint: ")
        assert hint is None or hint in lines[1]
        assert len(lines) <= 2

    def test_of_the_system(self, run, tmp_path):
        result = run("schema", "format", "-o", tmp_path / "nowhere" / "x.json", code=2)
        assert re.match(r"error: .*x\.json: No such file or directory\n  hint: ", result.stderr)

    def test_an_interrupt_is_130(self, run, monkeypatch):
        monkeypatch.setattr("microscale.cli.specs.list_formats", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("formats", code=130).stdout == ""

    def test_a_bug_keeps_its_traceback(self, run, monkeypatch):
        def broken():
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr("microscale.cli.specs.list_formats", broken)
        with pytest.raises(AssertionError, match="ZeroDivisionError"):
            run("formats")


class TestFormats:
    def test_lists_every_format_once(self, run, run_json):
        names = [row["name"] for row in run_json("formats")]
        assert names == ms.list_formats()
        lines = run("formats").stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["name", *names]
        assert len({line.index(ms.find_format(n).description) for line, n in zip(lines[1:], names, strict=True)}) == 1

    def test_detail(self, run, run_json):
        text = run("formats", "nvfp4").stdout
        for part in ("e2m1", "16 along one axis", "fp32 per tensor", "4.5", "0x8    -0 -0.5"):
            assert part in text
        data = run_json("formats", "nvfp4")
        assert data["element"]["values"] == ms.decode_table("e2m1").tolist()
        assert data["outer_scale"]["scale_max"] == 448

    def test_nan_and_infinity_are_text_in_json(self, run_json):
        values = run_json("formats", "mxfp8_e5m2")["element"]["values"]
        assert len(values) == 256
        assert {v for v in values if isinstance(v, str)} == {"nan", "inf", "-inf"}

    def test_of_a_path_and_of_a_variant(self, run_json, user_yaml):
        assert run_json("formats", user_yaml)["block"] == 16
        assert run_json("formats", "{format: mxfp4, block: 16}")["name"] == "mxfp4[block=16]"

    def test_from_a_file_or_folder(self, run_json, user_yaml):
        for source in (user_yaml, user_yaml.parent):
            assert "user_e3m1" in [row["name"] for row in run_json("formats", "--from", source)]
        assert run_json("formats", "user_e3m1")["element"]["max"] == 24

    @pytest.mark.parametrize("name", ms.list_formats())
    def test_every_format_has_a_detail(self, run, name):
        assert run("formats", name).stdout.startswith(name)


class TestRecipes:
    def test_lists_every_recipe_once(self, run, run_json):
        names = [row["name"] for row in run_json("recipes")]
        assert names == ms.list_recipes()
        assert [line.split()[0] for line in run("recipes").stdout.splitlines()] == ["name", *names]

    def test_detail(self, run, run_json):
        text = run("recipes", "nvfp4_static").stdout
        assert "x  nvfp4(static)" in text
        assert "*lm_head *router *.gate: keep in high precision (optional)" in text
        assert run_json("recipes", "nvfp4_static")["quantizers"]["x"]["outer_scale_mode"] == "static"


class TestSchema:
    @pytest.mark.parametrize("kind", KINDS)
    def test_prints_it(self, run_json, kind):
        assert run_json("schema", kind) == ms.schema(kind)

    def test_writes_it(self, run, tmp_path):
        target = tmp_path / "format.json"
        assert run("schema", "format", "-o", target).stdout == f"{target}\n"
        jsonschema.Draft202012Validator.check_schema(ms.schema("format"))
        assert target.read_text().startswith("{")

    def test_writing_has_json_too(self, run_json, tmp_path):
        assert run_json("schema", "format", "-o", tmp_path / "f.json") == {
            "kind": "format",
            "path": str(tmp_path / "f.json"),
        }


class TestPlan:
    def test_says_the_same_as_the_library_and_touches_nothing(self, run, run_json, checkpoint):
        before = files_of(checkpoint)
        made = ms.plan(checkpoint, "mxfp4_weight_only")
        assert run("plan", checkpoint, "-r", "mxfp4_weight_only").stdout == f"{made}\n"
        assert run("plan", checkpoint, "-r", "mxfp4_weight_only", "--summary").stdout == f"{made.summary()}\n"
        assert run_json("plan", checkpoint, "--recipe", "mxfp4_weight_only") == made.to_dict()
        assert files_of(checkpoint) == before

    def test_static_recipes_can_be_planned(self, run, checkpoint):
        assert "nvfp4(static)" in run("plan", checkpoint, "-r", "nvfp4_static").stdout


class TestQuantize:
    def test_writes_what_inspect_reads(self, run, run_json, checkpoint, tmp_path):
        before, out = files_of(checkpoint), tmp_path / "out"
        result = run("quantize", checkpoint, out, "-r", "nvfp4_dynamic")
        assert result.stdout.endswith(f"wrote {out}\n")
        assert result.stderr == ""  # no terminal, no progress bar
        assert files_of(checkpoint) == before
        assert (out / "tokenizer.json").exists()

        found = run_json("inspect", out)
        stored = {t["name"]: t["format"] for t in found["tensors"]}
        assert stored["model.layers.0.up_proj.weight"] == "nvfp4"
        assert stored["lm_head.weight"] is None
        assert found["recipe"] == "nvfp4_dynamic"
        text = run("inspect", out).stdout
        assert "recipe    nvfp4_dynamic" in text
        assert "inputs    nvfp4 in 2 layers" in text
        assert "model.layers.0.up_proj.weight" in run("inspect", out, "--tensors").stdout

    def test_json(self, run_json, checkpoint, tmp_path):
        data = run_json("quantize", checkpoint, tmp_path / "out", "-r", "mxfp8_weight_only")
        assert data["path"] == str(tmp_path / "out")
        assert data["plan"]["layers_quantized"] == 2

    def test_does_not_overwrite_unasked(self, run, checkpoint, tmp_path):
        out = tmp_path / "out"
        run("quantize", checkpoint, out, "-r", "mxfp8_weight_only")
        before = files_of(out)
        assert "--overwrite" in run("quantize", checkpoint, out, "-r", "mxfp4_weight_only", code=2).stderr
        assert files_of(out) == before
        run("quantize", checkpoint, out, "-r", "mxfp4_weight_only", "--overwrite")
        assert "mxfp4" in run("inspect", out).stdout

    def test_the_bytes_are_those_of_the_library(self, run, checkpoint, tmp_path):
        out, name = tmp_path / "out", "model.layers.0.up_proj.weight"
        run("quantize", checkpoint, out, "-r", "nvfp4_weight_only")
        expected = ms.quantize(ms.load(checkpoint)[name], "nvfp4")
        got = ms.load(out)[name]
        assert bytes(got.qdata.flatten().tolist()) == bytes(expected.qdata.flatten().tolist())
        assert bytes(got.scale.flatten().tolist()) == bytes(expected.scale.flatten().tolist())

    def test_a_recipe_that_does_not_fit_leaves_nothing_behind(self, run, checkpoint, tmp_path):
        recipe = tmp_path / "r.yaml"
        recipe.write_text("name: r\nquantizers: {w: mxfp4}\nrules:\n  - {match: '*.q_proj', fprop: {weight: w}}\n")
        assert "matches none" in run("quantize", checkpoint, tmp_path / "out", "-r", recipe, code=2).stderr
        assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


class TestInspect:
    def test_a_plain_checkpoint(self, run, run_json, checkpoint):
        assert "not quantized" in run("inspect", checkpoint).stdout
        assert run_json("inspect", checkpoint)["dialect"] is None

    def test_a_single_file(self, run_json, checkpoint):
        assert len(run_json("inspect", checkpoint / "model.safetensors")["tensors"]) == 6


class TestCompare:
    def test_measures_the_formats_asked_for(self, run, run_json, checkpoint):
        report = run_json("compare", checkpoint, "--formats", "mxfp4,{format: mxfp4, scale_rule: floor, block: 16}")
        assert {row["format"] for row in report["formats"]} == {"mxfp4", "mxfp4[block=16,scale_rule=floor]"}
        assert "mxfp8" in run("compare", checkpoint, "--formats", "mxfp8", "--formats", "nvfp4").stdout

    def test_writes_html(self, run, checkpoint, tmp_path):
        pytest.importorskip("matplotlib")
        page = tmp_path / "report.html"
        result = run("compare", checkpoint, "--formats", "mxfp4", "--html", page)
        assert "wrote" not in result.stdout
        assert page.read_text().lstrip().lower().startswith("<!doctype html>")

    def test_recipes_need_inputs(self, run, checkpoint):
        assert "input" in run("compare", checkpoint, "--recipes", "mxfp4_dynamic", code=2).stderr


class TestOutput:
    def test_plain_data(self, tmp_path):
        data = {"a": (1, float("nan")), "b": tmp_path, 3: {"c": float("-inf")}}
        assert output.plain(data) == {"a": [1, "nan"], "b": str(tmp_path), "3": {"c": "-inf"}}

    def test_a_table_in_a_pipe_is_never_cut(self, capsys):
        output.emit_table(("a", "b"), [("x" * 300, "y" * 300), ("", "")])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3
        assert lines[1] == "x" * 300 + "  " + "y" * 300
        assert all(line == line.rstrip() for line in lines)

    def test_markup_is_text(self, capsys):
        output.emit_table(("name",), [("nvfp4[block=16]",), ("[red]x[/red]",)])
        assert "nvfp4[block=16]" in (text := capsys.readouterr().out)
        assert "[red]x[/red]" in text

    def test_progress_is_silent_where_nobody_watches(self, capsys):
        with output.progress("work") as callback:
            callback(1, 2, "layer")
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", "")
