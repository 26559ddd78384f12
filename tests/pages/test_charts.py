from __future__ import annotations

import pytest

from drawn import Drawn
from sqft.pages import charts


def test_dots_stand_where_their_values_are():
    dots = [charts.Dot("a & b", 30, 10, "30 % ± 10", "dense"), charts.Dot("c", 12.5, None, "12.5 %", "merged")]
    drawn = Drawn(charts.dot_plot(dots, "accuracy", unit=" %"))
    assert {"a & b", "c", "30 % ± 10", "12.5 %", "0 %", "20 %", "40 %"} <= set(drawn.texts)
    assert drawn.marks["a & b: 30 % ± 10"][0] == pytest.approx(drawn.x_of(30, " %"))
    assert drawn.marks["c: 12.5 %"][0] == pytest.approx(drawn.x_of(12.5, " %"))
    (left, _), (right, _) = drawn.line("plain", width=5)
    assert (left, right) == pytest.approx((drawn.x_of(20, " %"), drawn.x_of(40, " %"))), "the whisker"
    assert drawn.label == "accuracy: a & b 30 % ± 10; c 12.5 %"


def test_all_wrong_and_differences_have_an_axis_too():
    assert {"0 %", "1 %"} <= set(Drawn(charts.dot_plot([charts.Dot("z", 0, 0, "0", "")], "", unit=" %")).texts)
    one_of_ten = Drawn(charts.dot_plot([charts.Dot("a", 10, 15, "10", "dense")], "share"))
    assert one_of_ten.line("plain", width=5)[0][0] == one_of_ten.texts["0"][0], "no share is below zero"
    below = Drawn(charts.dot_plot([charts.Dot("a", -2, 3, "−2", "dense")], "difference", lowest=-100))
    (left, _), (right, _) = below.line("plain", width=5)
    assert left < below.marks["a: −2"][0] < below.texts["0"][0] < right


def test_a_line_holds_every_point():
    points = [(1, 50.0), (2, 40.0), (3, 30.0), (4, 30.0)]
    drawn = Drawn(charts.line_chart([("loss", "main", points)], "loss", "step", "nats"))
    line = drawn.line("accent", width="1.6")
    assert [x for x, _ in line] == pytest.approx([drawn.x_of(x, ("1", "4")) for x, _ in points])
    assert line[0][1] < line[1][1] < line[2][1] == line[3][1], "y grows downwards in SVG"
    assert {"loss", "step", "nats", "1", "2", "3", "4", "30", "50"} <= set(drawn.texts), "whole steps"
    assert charts.line_chart([("loss", "main", [])], "loss", "step", "loss") == ""
    assert "loss, step 1: 3" in Drawn(charts.line_chart([("loss", "main", [(1, 3.0)])], "", "step", "loss")).marks


def test_settings_of_the_user_change_nothing():
    from matplotlib import rc_context

    dots = [charts.Dot("a", 30, 10, "30", "dense")]
    before = charts.dot_plot(dots, "accuracy")
    with rc_context({"font.size": 30, "axes.grid": False, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert charts.dot_plot(dots, "accuracy") == before
