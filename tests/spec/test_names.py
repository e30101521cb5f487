"""Names and paths that cannot be, or mean nothing: what is said, and what is offered instead."""

import re

import pytest

import microscale as ms

from .conftest import INLINE, parts, python_error


class TestNames:
    @pytest.mark.parametrize("name", ["größe", "模型", "a b", "x-1.5"])
    def test_that_work(self, write_format, name):
        assert ms.find_format(write_format(name=name)).name == name

    @pytest.mark.parametrize("name", ["", " ", " a", "a/b", "a\\b", "a\nb", "a.yaml", "a.yml", "a\x00"])
    def test_that_cannot_be(self, name):
        assert (
            python_error(lambda: ms.find_format({**INLINE, "name": name}))[0] == f"format: name {name!r} cannot be used"
        )
        recipe = {"name": name, "quantizers": {"w": "mxfp4"}, "rules": [{"match": "*", "fprop": {"weight": "w"}}]}
        assert python_error(lambda: ms.find_recipe(recipe))[0] == f"recipe: name {name!r} cannot be used"

    @pytest.mark.parametrize("name", ["", " ", "a\nb"])
    def test_of_quantizers(self, name):
        rule = {"match": "*", "fprop": {"weight": name}}
        data = {"name": "r", "quantizers": {name: "mxfp4"}, "rules": [rule]}
        assert "a quantizer cannot be called" in python_error(lambda: ms.find_recipe(data))[0]


class TestPaths:
    def test_a_file_of_the_folder_is_suggested(self, write_format):
        path = write_format(name="my_format")
        _, message, hint = parts(lambda: ms.find_format(path.with_name("my_fromat.yaml")))
        assert message == f"cannot read {path.with_name('my_fromat.yaml')}: no such file"
        assert hint == "did you mean 'my_format.yaml'?"

    def test_or_the_folder_is_shown(self, write_format):
        folder = write_format().parent
        assert parts(lambda: ms.find_format(folder / "nothing_like_it.yaml"))[2] == f"in {folder} there is x.yaml"

    def test_or_a_known_name(self):
        assert "'nvfp4' is known by name" in python_error(lambda: ms.find_format("nowhere/nvfp4.yaml"))[1]
        assert "did you mean 'nvfp4'" in python_error(lambda: ms.find_format("nowhere/nvfp5.yaml"))[1]
        assert "known formats: fp4" in python_error(lambda: ms.find_format("nowhere/zzzzzz.yaml"))[1]
        assert "'nvfp4_dynamic' is known" in python_error(lambda: ms.find_recipe("nowhere/nvfp4_dynamic.yaml"))[1]

    @pytest.mark.parametrize("quantizer", ["./y.yaml", "{format: y.yaml, block: 16}"])
    def test_in_a_recipe_it_has_a_position(self, recipe_error, write_format, quantizer):
        write_format()
        position, message, hint = recipe_error(quantizer)
        assert position == ("3:7" if "{" in quantizer else "3:3")
        assert re.fullmatch(r"cannot read .*y\.yaml: no such file", message)
        assert hint == "did you mean 'x.yaml'?"  # and not the recipe itself

    @pytest.mark.parametrize("find", [ms.find_format, ms.find_recipe])
    def test_a_folder_is_no_file(self, find, tmp_path):
        assert "it is a folder" in python_error(lambda: find(tmp_path))[0]

    @pytest.mark.parametrize("path", ["a/" + 5000 * "x", "~nobody-has-this-name/x.yaml", "a\x00/x.yaml"])
    def test_paths_that_cannot_be(self, path):
        assert "cannot read" in python_error(lambda: ms.find_format(path))[0]
