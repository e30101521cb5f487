"""The generated parts of the documentation: `python -m microscale.cli.docs [--check] [ROOT]`.

A Markdown file marks a place with `<!-- generated: NAME -->` and `<!-- end -->`; what stands between them comes from
the registries. A test runs the check, so a table cannot go stale.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microscale.cli import describe
from microscale.errors import MicroscaleError, unknown_name
from microscale.spec import document
from microscale.spec.registry import (
    data_folder,
    find_element,
    find_format,
    find_recipe,
    list_elements,
    list_formats,
    list_recipes,
)

if TYPE_CHECKING:
    from microscale.dispatch import Requires

_SECTION = re.compile(r"(<!-- generated: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def formats_table() -> str:
    """Return the table of all formats."""
    rows = [describe.format_row(find_format(name)) for name in _shipped("formats", list_formats())]
    return _table(
        describe.FORMAT_COLUMNS, [(f"`{name}`", *rest) for name, *rest in rows], right=("block", "bits/value")
    )


def elements_table() -> str:
    """Return the table of all named elements, scales among them."""
    rows = []
    for name in list_elements():
        element = find_element(name)
        rows.append((f"`{name}`", element.kind, str(element.width), f"{element.max_value:g}", element.description))
    return _table(("name", "kind", "bits", "max", "description"), rows, right=("bits", "max"))


def scale_rules_table() -> str:
    """Return the table of all scale rules."""
    rows = []
    for name, rule in document.read(data_folder("formats") / "scale_rules.yaml").data.items():
        tried = ", ".join(f"{c:g}" for c in rule.get("candidates", [1]))
        rows.append((f"`{name}`", rule.get("base", "`floor` or `nearest`"), tried, rule.get("metric", "")))
    return _table(("name", "base", "multipliers of the amax", "chosen by"), rows)


def recipes_table() -> str:
    """Return the table of all recipes."""
    rows = [describe.recipe_row(find_recipe(name)) for name in _shipped("recipes", list_recipes())]
    return _table(describe.RECIPE_COLUMNS, [(f"`{name}`", *rest) for name, *rest in rows])


def kernels_table() -> str:
    """Return the table of all kernels: what they require, where they are no fallback, how exact they are."""
    from microscale.dispatch import kernels

    rows = []
    for entry in kernels():
        requires = "; ".join(_requirements(entry.requires))
        native = "every device" if entry.native is None else ", ".join(entry.native)
        rows.append((entry.op, f"`{entry.name}`", requires or "nothing", native, entry.bound))
    return _table(("op", "kernel", "requires", "no fallback on", "exactness"), rows)


def public_table() -> str:
    """Return the table of the public names: how each is called, and the first line of its docstring."""
    package = importlib.import_module("microscale")
    names = [n for n in package.__all__ if not n.startswith("__")]
    values = [(name, getattr(package, name)) for name in names]
    return _table(("name", "what it is"), [(f"`{_call(name, value)}`", _summary(value)) for name, value in values])


def commands_table() -> str:
    """Return the table of the commands, each with its example."""
    from microscale.cli.app import COMMANDS

    rows = [(f"`{name}`", _summary(function), f"`{example}`") for name, (function, example) in COMMANDS.items()]
    return _table(("command", "what it does", "example"), rows)


def ops_list() -> str:
    """Return the aten operations that a BlockScaledTensor takes, without their overloads."""
    from microscale.ops.aten import TABLE

    names = sorted({str(op).removeprefix("aten.").split(".")[0] for op in TABLE})
    return ", ".join(f"`{name}`" for name in names)


def bench_table() -> str:
    """Return the committed quantize results of the H200: time and share of the copy bandwidth, by shape."""
    report = json.loads((_results() / "nvidia-h200" / "quantize.json").read_text(encoding="utf-8"))
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in report["rows"]))
    cells: dict[tuple[str, ...], dict[tuple[int, ...], str]] = {}
    for r in report["rows"]:
        text = "not measured" if r["us"] is None else f"{r['us']:.1f} us, {r['ratio']:.2f}"
        cells.setdefault((r["op"], r["format"], r["mode"], f"`{r['kernel']}`"), {})[tuple(r["shape"])] = text
    rows = [(*key, *(found.get(s, "") for s in shapes)) for key, found in cells.items()]
    columns = ("op", "format", "mode", "kernel", *("x".join(map(str, s)) for s in shapes))
    return f"{_bench_head(report)}\n\n{_table(columns, rows)}"


def matmul_tables() -> str:
    """Return the committed matmul results of every device: one table an op, by rows of the activations."""
    parts = []
    for path in sorted(_results().glob("*/matmul.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        parts.append(_bench_head(report))
        for op in dict.fromkeys(r["op"] for r in report["rows"]):
            parts.append(f"`{op}`:\n\n{_matmul_table([r for r in report['rows'] if r['op'] == op])}")
    return "\n\n".join(parts) or "No results are committed yet."


def _matmul_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a weight and kind of activations; a cell is the time, the speed-up, the share of the floor, the note."""
    sizes = sorted({r["m"] for r in rows})
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    kernels: dict[tuple[str, ...], dict[str, None]] = {}
    for r in rows:
        case = r["case"].removesuffix(", plain").removesuffix(", prepared")  # one line: few rows want another layout
        key = (r["format"], r["activations"], case, f"{r['n']}x{r['k']}")
        if r["m"] in cells.get(key, {}):  # many rows are measured both ways
            key = (*key[:2], r["case"], key[3])
        text = "not measured"
        if r["us"] is not None:
            text = f"{r['us']:.1f} us, {r['speedup']:.2f}x, {r['ratio']:.2f}"
            text += f"; {r['note']}" if r["note"] else ""
        cells.setdefault(key, {})[r["m"]] = text
        kernels.setdefault(key, {})[f"`{r['kernel']}`"] = None
    lines = [(*key, *(found.get(m, "") for m in sizes), ", ".join(kernels[key])) for key, found in cells.items()]
    return _table(("weight", "activations", "case", "N x K", *(f"M = {m}" for m in sizes), "kernels"), lines)


def train_table() -> str:
    """Return the committed training results of every device: one line a block and recipe."""
    parts = []
    for path in sorted(_results().glob("*/train.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = []
        for r in report["rows"]:
            if r["us"] is None:
                rows.append((r["block"], r["recipe"], "not measured", "", "", "", r["note"]))
                continue
            named = {name: f"{us / 1e3:.1f}" for name, us in r["breakdown"].items()}
            casts = "+".join(us for name, us in named.items() if name.startswith("cast")) or "0"
            gemms = "+".join(named[name] for name in ("fprop", "dgrad", "wgrad") if name in named)
            kernels = ", ".join(f"`{name}`" for name in dict.fromkeys(r["kernels"].values()))
            numbers = (f"{r['us'] / 1e3:.1f} ms, {r['speedup']:.2f}x", f"{r['saved_ratio']:.2f}x", gemms, casts)
            rows.append((r["block"], r["recipe"], *numbers, kernels))
        columns = ("block", "recipe", "step", "saved", "fprop+dgrad+wgrad ms", "casts ms", "kernels")
        parts += [_bench_head(report), _table(columns, rows)]
    return "\n\n".join(parts) or "No results are committed yet."


def tiny_lm_tables() -> str:
    """Return the committed results of `examples/tiny_lm.py`: final losses by recipe, perplexities by what quantizes."""
    from microscale.report.training import over_seeds, over_seeds_text  # imports torch

    parts = []
    for path in sorted(_results().glob("*/tiny_lm.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        model = report["model"]
        runs = over_seeds(report["runs"], "final_loss")
        quantized = over_seeds(report["perplexities"], "perplexity", ("recipe", "trained_by"))
        steps, tokens = report["runs"][0]["steps"], report["runs"][0]["tokens"]
        head = (
            f"{report['environment']['device']}, {model['parameters'] / 1e6:.1f} M parameters, {steps} steps of "
            f"{tokens // steps} bytes, learning rate {model['learning_rate']:g}; loss in nats a byte, of "
            f"{model['held_out_tokens']} held-out ones. ± after a mean: standard deviation over seeds; after a ratio: "
            "standard error of the mean over seeds of the ratio to bf16 of the same seed."
        )
        rows = [(row["recipe"], str(row["seeds"]), *over_seeds_text(row)) for row in runs]
        parts += [head, _table(("trained by", "seeds", "held-out loss", "to bf16"), rows)]
        if quantized:
            named = [(r["recipe"], r["trained_by"], str(r["seeds"]), *over_seeds_text(r)) for r in quantized]
            parts.append(_table(("quantized by", "trained by", "seeds", "perplexity", "to bf16"), named))
        skipped = [f"{row['recipe']} with seed {row['seed']} ({row['reason']})" for row in report["skipped"]]
        parts += [f"Not there: {', '.join(skipped)}."] if skipped else []
    return "\n\n".join(parts) or "No results are committed yet."


def _results() -> Path:
    return data_folder("formats").parent / "benchmarks" / "results"


def _bench_head(report: Mapping[str, Any]) -> str:
    """Where a report was measured, and the ceilings of that run."""
    place = report["environment"]
    ceilings = (
        f"{name.removesuffix('_tflops').replace('_', ' ')} {value:.0f} "
        f"{'TFLOP/s' if name.endswith('_tflops') else 'GB/s'}"
        for name, value in report["ceilings"].items()
    )
    return f"{place['device']}, torch {place['torch']}, Triton {place['triton']}; {', '.join(ceilings)}"


def coverage_table() -> str:
    """Return where the suite interprets and compiles each Triton kernel, and on which devices results say it ran.

    The suite takes its architectures from the same file, and holds it against the registered kernels.
    """
    root = data_folder("formats").parent
    known = json.loads((root / "tests" / "kernels" / "coverage.json").read_text(encoding="utf-8"))
    ran: dict[str, set[str]] = {}
    for path in sorted(p for name in ("quantize", "matmul") for p in _results().glob(f"*/{name}.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        place = f"{report['environment']['device']} (sm_{report['environment']['capability'].replace('.', '')})"
        for row in report["rows"]:
            for kernel in row["kernel"].split(" + ") if row["checked"] else ():
                ran.setdefault(kernel, set()).add(place)
    rows = []
    for name, facts in known.items():
        compiled = ", ".join(f"sm_{n}" for n in facts["compiled"])
        places = ", ".join(sorted(ran.get(name, ()))) or "none yet"
        rows.append((f"`{name}`", f"`{facts['interpreted']}`", compiled, places))
    return _table(("kernel", "interpreted by", "compiled for", "checked and timed on, by results"), rows)


SECTIONS: dict[str, Callable[[], str]] = {
    "formats": formats_table,
    "elements": elements_table,
    "scale_rules": scale_rules_table,
    "recipes": recipes_table,
    "kernels": kernels_table,
    "public": public_table,
    "commands": commands_table,
    "ops": ops_list,
    "bench_quantize": bench_table,
    "bench_matmul": matmul_tables,
    "bench_train": train_table,
    "tiny_lm": tiny_lm_tables,
    "coverage": coverage_table,
}


def render(text: str) -> str:
    """Return Markdown with every generated section as it should be. Raises UnknownNameError for another section."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in SECTIONS:
            raise unknown_name("generated section", name, SECTIONS)
        return f"{match[1]}{SECTIONS[name]()}\n{match[3]}"

    return _SECTION.sub(fill, text)


def documents(root: Path) -> list[Path]:
    """Return the Markdown files of a checkout that may hold generated sections."""
    return [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.is_file()]


def stale(root: Path) -> list[Path]:
    """Return the files of a checkout whose generated sections are not as they should be."""
    return [path for path in documents(root) if render(text := path.read_text(encoding="utf-8")) != text]


def update(root: Path) -> list[Path]:
    """Rewrite the stale files of a checkout; returns them."""
    changed = stale(root)
    for path in changed:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
    return changed


def _shipped(kind: str, names: Iterable[str]) -> list[str]:
    """Leave out what other packages or this process registered: the documentation is about this one."""
    return [name for name in names if (data_folder(kind) / f"{name}.yaml").is_file()]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rule = ("--:" if name in right else "---" for name in columns)
    return "\n".join((line(columns), f"|{'|'.join(rule)}|", *(line(row) for row in rows)))


def _requirements(requires: Requires) -> Iterator[str]:
    """What a kernel needs, one phrase a field that is set."""
    for field in dataclasses.fields(requires):
        value, name = getattr(requires, field.name), field.name.replace("_", " ")
        if field.name == "checks":
            yield from (text for text, _ in value)
        elif isinstance(value, tuple) and value:
            joiner = "." if field.name.endswith("capability") else " or "
            yield f"{name} {joiner.join(map(str, value))}"


def _summary(value: Any) -> str:
    """First paragraph of a docstring, up to its first full stop."""
    paragraph = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"\. (?=[A-Z`])", paragraph)[0].removesuffix(".")


def _call(name: str, value: Any) -> str:
    """`quantize(x, format, *, axis=-1, ...)` for a function, the bare name for a class."""
    return name if inspect.isclass(value) else f"{name}({', '.join(_parameters(value))})"


def _parameters(function: Callable[..., Any]) -> Iterator[str]:
    keyword_only = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "*"
        kind = parameter.kind
        prefix = "*" if kind is parameter.VAR_POSITIONAL else "**" if kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        yield f"{prefix}{parameter.name}{default}"


def main(arguments: Sequence[str]) -> int:
    """Rewrite stale sections under ROOT (default: here), or with --check only name them; returns the exit code."""
    check = "--check" in arguments
    roots = [a for a in arguments if a != "--check"] or ["."]
    try:
        found = (stale if check else update)(Path(roots[0]))
    except MicroscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in found:
        print(f"{'stale' if check else 'updated'} {path}")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
