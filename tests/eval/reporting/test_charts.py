"""Charts keep what they say within their edges."""

import re
import warnings
from xml.etree import ElementTree

import pytest
from matplotlib.textpath import TextPath

from eval.reporting.charts import Line, line_chart

SHORT = ["mae", "rmae", "cmae", "random encoder"]
LONG = ["mae", "rmae", "cmae (hidden token, tokens patch)", "supervised", "random encoder"]


def places(chart: str) -> dict[str, tuple[float, float, float]]:
    """Text → its left and right edge and its height, in points, as the SVG's own font sets it."""
    found = {}
    for text in ElementTree.fromstring(chart).iter("{http://www.w3.org/2000/svg}text"):
        x, y = map(float, re.findall(r"-?[0-9.]+", text.get("transform", "")[10:])[:2])
        width = TextPath((0, 0), text.text, size=8).get_extents().width
        found[str(text.text)] = (x, x + width, y)
    return found


@pytest.mark.parametrize(("labels", "rows"), [(SHORT, 1), (LONG, 2), ([9 * "long " + "a"], 1)])
def test_no_name_of_a_legend_is_cut(labels: list[str], rows: int) -> None:
    lines = [Line((0, 1), (0, n), n, label) for n, label in enumerate(labels)]
    chart = line_chart(lines, title="t", x="x", y="y")
    width = float(ElementTree.fromstring(chart).get("viewBox", "").split()[2])
    edges = [places(chart)[label] for label in labels]
    assert all(left >= 0 and right <= width for left, right, _ in edges)
    assert len({y for *_, y in edges}) == rows


@pytest.mark.parametrize("name", ["a$\\frac$b", "cost $1 to $2", "_mine", r"data\group"])
def test_a_name_is_drawn_as_it_is(name: str) -> None:
    chart = line_chart([Line((0, 1), (0, 1), 0, name)], title=f"Loss: {name}", x="x", y="y")
    drawn = [text.strip() for text in ElementTree.fromstring(chart).itertext()]
    assert {name, f"Loss: {name}"} <= set(drawn)
    assert f'aria-label="Loss: {name}"' in chart


def test_a_long_name_is_drawn_in_lines_within_the_chart() -> None:
    name = "ViT-" + "0123456789" * 14
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of letters that no font of matplotlib's has
        lines = [Line((0, 1), (0, 1), 0, name), Line((0, 1), (1, 0), 1, "日本語")]
        chart = line_chart(lines, title=f"Loss: {name}", x="x", y="y")
    root = ElementTree.fromstring(chart)
    width = float(root.get("viewBox", "").split()[2])
    drawn = "".join(text.strip() for text in root.itertext())
    assert drawn.count(name) == 2
    assert root.get("aria-label") == f"Loss: {name}"
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        x = float(re.findall(r"-?[0-9.]+", text.get("transform", "")[10:])[0])
        size = float(re.findall(r"([0-9.]+)px", text.get("style", ""))[0])
        word = str(text.text)
        if word in name:
            wide = TextPath((0, 0), word, size=size).get_extents().width
            centred = "middle" in text.get("style", "")
            left = x - wide / 2 if centred else x
            assert left >= 0
            assert left + wide <= width
