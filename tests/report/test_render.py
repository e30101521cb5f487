"""Reports as text, HTML and pictures."""

import dataclasses
import html.parser
import itertools
import re
import sys

import pytest

import microscale as ms
from microscale.errors import InputError, MissingDependencyError
from microscale.report import picture
from microscale.report.compare import compare
from microscale.report.render import to_html, to_png, to_text
from microscale.report.results import CompareReport, RecipeResult, Reference, SkippedRecipe

pytest.importorskip("matplotlib")


@pytest.fixture
def report(checkpoint) -> CompareReport:
    """Every format on a tiny checkpoint, and made-up recipes of a causal LM."""
    measured = compare(checkpoint)
    recipes = tuple(
        RecipeResult(
            recipe=name, description="", weight="w", input=None if "weight" in name else "x", layers=2,
            stored_bits_per_value=4.25 + 2 * (i % 3), layer_bytes=1000, model_bytes=9000, cosine_mean=0.99,
            cosine_worst=0.98, worst_text=0, relative_error=0.1, kl=1e-5 * 1.3**i, perplexity=12.5, seconds=1.0,
        )
        for i, name in enumerate(ms.list_recipes())
    )  # fmt: skip
    reference = Reference("TinyForCausalLM", "causal_lm", "logits", "float32", 3, 40, 1, 12.25, 0.1)
    skipped = (SkippedRecipe("odd", "it <does> not fit", "use another"),)
    return dataclasses.replace(measured, reference=reference, recipes=recipes, skipped=skipped)


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 100, 140, None])
def test_text_names_everything_and_keeps_to_the_width(report, width):
    text = to_text(report, width=width)
    for name in [*ms.list_formats(), *ms.list_recipes()]:
        assert re.search(rf"^ *\d+  {name} ", text, re.MULTILINE), name
    assert "skipped odd: it <does> not fit (use another)" in " ".join(text.split())
    assert "perplexity 12.250" in " ".join(text.split())
    assert text.isascii() and "\x1b" not in text
    if width is not None:
        assert max(map(len, text.splitlines())) <= width


def test_narrow_text_says_what_it_leaves_out(report):
    wide, narrow = to_text(report), to_text(report, width=80)
    assert "worst layer" in wide and "not shown" not in wide
    assert re.search(r"not shown at this width: .*worst layer", narrow)


def test_color_only_when_asked_for(report):
    assert "\x1b[" in to_text(report, color=True)


def test_text_needs_no_matplotlib(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert to_text(report)


def test_lost_values_are_reported(report):
    first = dataclasses.replace(report.formats[0], lost=31)
    text = to_text(dataclasses.replace(report, formats=(first, *report.formats[1:])))
    assert f"{first.format}: 31 finite values share a block with a NaN" in text


def test_numbers_that_are_missing_or_tiny(report):
    row = dataclasses.replace(report.recipes[0], cosine_mean=None, kl=3e-9)
    text = to_text(dataclasses.replace(report, recipes=(row,)))
    assert "nan" in text and "3.0e-09" in text


# -- html --------------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags that are open, tags that were seen, attributes that load something."""

    void = frozenset({"meta", "path", "use", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def test_html_is_one_sound_file_with_a_picture(report, tmp_path):
    path = to_html(report, tmp_path / "new" / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.seen.count("svg") == 1 and page.seen.count("table") == 2 + len(report.formats)
    assert not {"script", "link", "img", "iframe"} & set(page.seen)
    assert all(link.startswith("#") for link in page.links), "nothing is loaded from elsewhere"
    assert "@import" not in text and "url(http" not in text


def test_html_has_every_name_in_picture_and_tables(report, tmp_path):
    text = to_html(report, tmp_path / "r.html").read_text(encoding="utf-8")
    svg = text[text.index("<svg") : text.index("</svg>")]
    tables = text[text.index("</svg>") :]
    for name in [*ms.list_formats(), *ms.list_recipes()]:
        assert f">{name}<" in svg and f">{name}<" in tables
    assert "stored bits per value" in svg and "(dB)" in svg and "(nats" in svg
    for part in ("How to read this", f"torch {report.environment['torch']}", "it &lt;does&gt; not fit"):
        assert part in tables


def test_html_escapes_names(report, tmp_path):
    text = to_html(dataclasses.replace(report, model="a<b>&c"), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<b>" not in text and "a&lt;b&gt;&amp;c" in text


def test_html_of_weights_only(checkpoint, tmp_path):
    text = to_html(compare(checkpoint, ["mxfp4"]), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Model output" not in text and text.count("<svg") == 1


def test_the_same_report_gives_the_same_bytes(report):
    assert picture.to_svg(report) == picture.to_svg(report)


# -- picture -----------------------------------------------------------------------------------------------------------


def test_png(report, tmp_path):
    path = to_png(report, tmp_path / "new" / "r.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_labels_do_not_overlap_and_stay_inside(report):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figure = picture.draw(report)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    assert len(figure.axes) == 2
    for axes, count in zip(figure.axes, (len(report.formats), len(report.recipes)), strict=True):
        assert axes.get_xlabel() and axes.get_ylabel()
        boxes = [Text.get_window_extent(label, renderer) for label in axes.texts]  # without the leader line
        assert len(boxes) == count
        for a, b in itertools.combinations(boxes, 2):
            assert not a.overlaps(b)
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_up_is_better(report):
    figure = picture.draw(report)
    (low, high), (bottom, top) = (axes.get_ylim() for axes in figure.axes)
    assert low < high and bottom > top  # decibels rise, errors fall


def test_what_cannot_be_drawn_is_noted(report):
    exact = dataclasses.replace(report.formats[0], sqnr_db_mean=None)
    broken = dataclasses.replace(report.recipes[0], relative_error=None, kl=None)
    changed = dataclasses.replace(report, formats=(exact, *report.formats[1:]), recipes=(broken, *report.recipes[1:]))
    svg = picture.to_svg(changed)
    assert f"no error at all: {exact.format}" in svg
    assert re.search(rf"zero or not finite\): {broken.recipe}", svg)


def test_nothing_to_draw(report):
    with pytest.raises(InputError, match="nothing to draw"):
        picture.draw(dataclasses.replace(report, formats=(), recipes=()))


def test_a_missing_matplotlib_names_the_command(report, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for write in (to_html, to_png):
        with pytest.raises(MissingDependencyError, match="matplotlib") as error:
            write(report, tmp_path / "r")
        assert "pip install 'microscale[report]'" in error.value.hint
        assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([], []),
        ([5.0], [5.0]),
        ([1.0, 5.0, 9.0], [1.0, 5.0, 9.0]),
        ([5.0, 5.0], [4.5, 5.5]),
        ([5.0, 5.2, 9.0], [4.6, 5.6, 9.0]),
        ([0.0, 0.0], [0.0, 1.0]),
        ([10.0, 10.0, 10.0], [8.0, 9.0, 10.0]),
    ],
)
def test_spread_moves_as_little_as_possible(wanted, expected):
    assert picture.spread(wanted, 1.0, 0.0, 10.0) == pytest.approx(expected)


def test_spread_spaces_evenly_what_does_not_fit():
    assert picture.spread([5.0] * 5, 1.0, 0.0, 2.0) == [0.0, 0.5, 1.0, 1.5, 2.0]
