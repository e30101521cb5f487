"""Gluon's tensor language as far as `jit_sixes.py` uses it, on torch tensors: Gluon has no interpreter.

A register of a thread is an element of a tensor here, and layouts do nothing: the real ones move nothing either, which
the compiler asserts where they change.
"""

import ast
import inspect
import types
from pathlib import Path

import numpy as np
import torch


class Stage:
    """Words in shared memory."""

    def __init__(self, words):
        self.words, self.shape = words, list(words.shape)

    def load(self, _layout):
        return self.words


def _words(t):
    return t.numpy().astype(np.uint32)


def language(run):
    """The names of Gluon's language; `run` is an emulator of PTX on dictionaries of arrays."""

    def assembly(asm, constraints, given, dtype, is_pure, pack):
        outputs = constraints.count("=")
        assert len(given) == constraints.count("r") - outputs and is_pure and pack == 1
        made = run(asm, {f"${outputs + i}": _words(t) for i, t in enumerate(given)})
        return tuple(torch.from_numpy(made[f"${i}"].astype(np.int64)) for i in range(len(dtype)))

    names = {
        "constexpr": None, "int32": torch.int32, "static_range": range, "inline_asm_elementwise": assembly,
        "SliceLayout": lambda *_: None, "DistributedLinearLayout": lambda *_: None,
        "arange": lambda start, stop, _: torch.arange(start, stop),
        "expand_dims": torch.unsqueeze, "convert_layout": lambda t, _layout, assert_trivial: t,
        "split": lambda t: tuple(t.unbind(-1)), "join": lambda a, b: torch.stack([a, b], -1),
    }  # fmt: skip
    return types.SimpleNamespace(**names)


def functions(module, run):
    """The functions of a Gluon module as plain ones."""
    tree = ast.parse(Path(inspect.getfile(module)).read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for node in tree.body:
        node.decorator_list = []
        for argument in node.args.args:
            argument.annotation = None
    space = {"gl": language(run)}
    exec(compile(tree, module.__file__, "exec"), space)
    return types.SimpleNamespace(**space)
