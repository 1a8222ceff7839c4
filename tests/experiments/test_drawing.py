"""Drawings and pages: the same marks as SVG and as pixels, every name only text."""

import numpy as np
import pytest

from experiments.reporting import drawing, page
from experiments.reporting.drawing import Axis, Box, Chart, Drawing, Line, Text

NASTY = '<script>alert(1)</script> & "quoted"'


def test_names_are_text_in_every_part_of_a_drawing():
    chart = drawing.curves(NASTY, {NASTY: ("raw", [(1, 2.0), (2, 1.0)])})
    svg = str(chart.svg())
    assert "<script" not in svg and svg.count("&lt;script") == 3  # the label, and each of two points on hover
    assert "<script" not in page.render("comparison.html", **empty(title=NASTY, charts=[chart], notes=[NASTY]))


def empty(**values):
    return {"runs": [], "groups": None, "scored": [], "pairs": [], "intervals": True, "what": "", "legend": []} | values


def test_a_name_that_a_template_lacks_is_an_error():
    with pytest.raises(Exception, match="'notes' is undefined"):
        page.render("comparison.html", **empty(title="", charts=[]))


def test_a_drawing_is_the_same_each_time_in_both_forms():
    def made():
        return drawing.scatter("a", np.arange(50.0), np.arange(50.0) ** 2)

    assert made().svg() == made().svg() and np.array_equal(made().pixels(), made().pixels())


def test_pixels_have_the_marks_where_the_svg_has_them():
    marks = [Box(10, 20, 30, 5, "raw"), Line([(0, 50), (100, 50)], "bad", 2), Text(5, 80, "words")]
    pixels = Drawing(width=100, height=100, marks=marks).pixels()
    assert pixels.shape == (200, 200, 3)
    box, line = ((pixels == np.array(colour)).all(-1) for colour in ([0x1F, 0x5F, 0xBF], [0xB0, 0x2A, 0x2A]))
    assert box[42:48, 22:78].all() and not box[:38].any() and not box[:, 82:].any()
    assert line[99:101, 2:198].all() and not line[:96].any()
    assert (pixels[140:170, :100] < 128).any() and (pixels[110:130] == 255).all()


def test_a_point_that_is_drawn_last_covers_the_grid():
    chart = Chart("", Axis(0, 1), Axis(0, 1))
    chart.dot(0.5, 0.5, "bad", radius=8)
    x, y = (round(drawing.SCALE * place) for place in (chart.right(0.5), chart.down(0.5)))
    assert (chart.pixels()[y - 4 : y + 4, x - 4 : x + 4] == [0xB0, 0x2A, 0x2A]).all()


@pytest.mark.parametrize("low, high", [(0.5, 30.0), (1e-3, 1e3), (2.0, 9.0)])
def test_a_logarithmic_axis_has_round_values_at_equal_ratios(low, high):
    axis = Axis(low, high, log=True)
    values = [value for value, _ in axis.ticks()]
    assert 2 <= len(values) <= 8 and all(low <= value <= high for value in values)
    assert axis.share(low) == 0 and axis.share(high) == 1 and axis.share((low * high) ** 0.5) == pytest.approx(0.5)


def test_a_sheet_keeps_every_drawing_and_its_legend_inside():
    charts = [drawing.curves(f"chart {k}", {"a": ("raw", [(1, 1.0), (2, k + 2.0)])}) for k in range(3)]
    whole = drawing.sheet(charts, 2, [("s0", "", "first"), ("s1", "6 3", "second"), ("s2", "", "third")])
    assert [each.title for *_, each in whole.inner] == ["chart 0", "chart 1", "chart 2"]
    assert all(x + each.width <= whole.width and y + each.height <= whole.height for x, y, each in whole.inner)
    assert max(mark.y for mark in whole.marks if isinstance(mark, Text)) <= whole.height
    pixels = whole.pixels()
    assert pixels.shape[:2] == tuple(round(drawing.SCALE * side) for side in (whole.height, whole.width))
    assert drawing.sheet([], 2, [("s0", "", "alone")]).pixels().std() > 0
