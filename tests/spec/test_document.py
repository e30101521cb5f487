"""YAML with positions: what is read, what is refused, and where the refusal points."""

import pytest

from microscale.errors import SpecError
from microscale.spec import document


def read(text):
    return document.parse(text, "f.yaml").data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),  # YAML 1.1 reads False
        ("no", "no"),
        ("yes", "yes"),
        ("16:16", "16:16"),  # YAML 1.1 reads 976
        ("0o17", "0o17"),
        ("2020-01-01", "2020-01-01"),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("32", 32),
        ("-7", -7),
        ("1.5", 1.5),
        ("1e-3", 1e-3),  # YAML 1.1 reads a string
        ("'32'", "32"),
    ],
)
def test_scalars_are_those_of_the_core_schema(text, value):
    got = read(f"key: {text}")["key"]
    assert got == value
    assert type(got) is type(value)


def test_marks_point_at_keys_and_items():
    doc = document.parse("a: 1\nb:\n  - {c: 2, d: 3}\n", "f.yaml")
    assert doc.where(("a",)) == "f.yaml:1:1"
    assert doc.where(("b", 0, "d")) == "f.yaml:3:12"
    assert doc.where(("b", 0, "missing")) == "f.yaml:3:5"
    assert doc.where(("missing",)) == "f.yaml:1:1"


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: 1\na: 2\n", "f.yaml:2:1", "key 'a' is given twice"),
        ("a: {b: 1, b: 2}\n", "f.yaml:1:11", "key 'b' is given twice"),
        ("a: [1,\n", "f.yaml:2:1", "not valid YAML"),
        ("a: 1\n\tb: 2\n", "f.yaml:2:1", "not valid YAML"),
        ("a: *nowhere\n", "f.yaml:1:4", "not valid YAML"),
        ("a: !!python/object:os.system\n", "f.yaml:1:4", "tag"),
        ("", "f.yaml:1:1", "the file is empty"),
        ("# only a comment\n", "f.yaml:1:1", "the file is empty"),
    ],
)
def test_bad_yaml_names_file_line_and_column(text, where, what):
    with pytest.raises(SpecError) as caught:
        read(text)
    assert caught.value.message.startswith(where + " ")
    assert what in caught.value.message
    assert "\n" not in caught.value.message


def test_an_alias_inside_itself_is_an_error_not_a_recursion():
    with pytest.raises(SpecError, match=r"f.yaml:1"):
        read("a: &a [*a]\n")


def test_an_alias_is_fine_where_it_is_finite():
    assert read("a: &a {b: 1}\nc: *a\n") == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_file_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(SpecError, match=r"cannot read .*missing\.yaml"):
        document.read(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match=r"cannot read .*binary\.yaml"):
        document.read(tmp_path / "binary.yaml")
