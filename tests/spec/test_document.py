"""YAML with positions: what is read, what is refused, and where the refusal points."""

import pytest

from microscale.errors import SpecError
from microscale.spec import document, registry

from .conftest import parts


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


@pytest.mark.parametrize(
    ("text", "position", "message", "hint"),
    [
        ("a: &a {b: 1}\nc: {<<: *a}\n", "2:5", "merge keys (<<) are not supported", "write the merged keys out"),
        ("? [a, b]\n: 1\n", "1:3", "a list cannot be a key", "quotes"),
        ("a: {{b}}\n", "1:5", "a mapping cannot be a key", "quotes"),
        ("a: 1\na: 2\n", "2:1", "key 'a' is given twice", "delete one"),
        ("1: 1\n'1': 2\n", "2:1", "key '1' is given twice", "delete one"),
        ("a: \x01\n", "1:4", "not valid YAML: character U+0001 is not allowed", "UTF-8"),
        ("a: " + "9" * 5000, "1:4", "no such number", "quotes"),
        ("a: !!python/name:os.system\n", "1:4", "could not determine a constructor for the tag", "tags"),
        ("", "1:1", "the file is empty", "mapping"),
        ("a: &a [*a]\n", "1:1", "an alias refers to what it stands in", "write the value out"),
    ],
)
def test_what_is_no_plain_data(text, position, message, hint):
    found = parts(lambda: document.parse(text, "f.yaml"))
    assert found[0] == position
    assert found[1].startswith(message)
    assert hint in found[2]


def test_keys_are_strings():
    assert document.parse("1: a\ntrue: b\n'': c\n'<<': d\n", "f.yaml").data == {
        "1": "a",
        "true": "b",
        "": "c",
        "<<": "d",
    }


def test_not_a_number():
    value = document.parse("a: [.nan, .NaN, .inf, -.inf, nan]\n", "f.yaml").data["a"]
    assert str(value) == "[nan, nan, inf, -inf, 'nan']"


def test_aliases_of_aliases_end():
    lines = [f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True)]
    text = "\n".join([f"a: &a [{','.join('1' * 10)}]", *lines])
    with pytest.raises(SpecError, match="more than 100000 values"):
        document.parse(text, "f.yaml")


def test_brackets_without_end():
    with pytest.raises(SpecError, match="nested too deeply"):
        document.parse("[" * 5000, "f.yaml")


@pytest.mark.parametrize("name", ["elements.yaml", "scale_rules.yaml"])
def test_shipped_tables_are_checked_too(monkeypatch, write, name):
    folder = write(name, "e9m9: 5\n").parent
    monkeypatch.setattr(registry, "data_folder", lambda kind: folder)
    with pytest.raises(SpecError, match=rf"{name}:1:1 e9m9 must be a mapping, not 5"):
        (registry._elements if name == "elements.yaml" else registry._scale_rules).__wrapped__()
