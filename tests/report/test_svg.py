from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kdrl.report.svg import Level, Series, chart_css, line_chart, noisy, running_mean, short, thin, ticks

finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 6))


@given(finite, st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside(low: float, width: float):
    # Narrower, and neighbouring floats are further apart than what is allowed below.
    assume(width >= 1e-8 * abs(low))
    found = ticks(low, low + width, 5)
    assert len(found) <= 7
    assert all(low - 1e-6 * width <= t <= low + width * (1 + 1e-6) for t in found)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=40))
def test_every_chart_is_xml_with_all_points_inside(points: list[tuple[float, float]]):
    x, y = zip(*sorted(points), strict=True)
    picture = line_chart([Series("a<b & c", x, y, dots=True)], levels=[Level("<top>", max(y))], width=300, height=150)
    root = ET.fromstring(picture)
    for circle in root.iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 <= float(circle.attrib["cx"]) <= 300
        assert 0 <= float(circle.attrib["cy"]) <= 150
    assert "nan" not in picture


def test_higher_values_are_drawn_higher_and_in_order():
    picture = line_chart([Series("a", [1, 2, 3], [0.0, 1.0, 0.5])])
    found = re.search(r'<polyline class="line s0" points="([^"]+)"', picture)
    assert found
    (x1, y1), (x2, y2), (x3, y3) = [tuple(map(float, pair.split(","))) for pair in found[1].split()]
    assert x1 < x2 < x3
    assert y2 < y3 < y1


def test_an_empty_chart_is_still_a_picture():
    assert ET.fromstring(line_chart([])).tag.endswith("svg")


def test_only_noisy_lines_are_smoothed():
    up = [float(i) for i in range(100)]
    assert not noisy(up)
    assert noisy([i % 2 for i in range(100)])
    assert not noisy([1.0] * 100)
    x = list(range(100))
    assert "raw" not in line_chart([Series("a", x, up)])
    assert "raw" in line_chart([Series("a", x, [i % 2 for i in range(100)])])


@given(st.lists(finite, min_size=1, max_size=900))
def test_thinning_keeps_the_mean_of_the_ends_in_range(y: list[float]):
    x, thinned = thin(range(len(y)), y, 100)
    assert len(x) == len(thinned) == min(100, len(y))
    assert min(y) - 1e-6 <= min(thinned)
    assert max(thinned) <= max(y) + 1e-6


def test_running_mean_by_hand():
    assert running_mean([1, 2, 6], 3) == [1.5, 3.0, 4.0]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.25, "0.25"), (12345, "12.3k"), (2.5e6, "2.5M"), (5e-4, "5e-4"), (-0.4, "-0.4")]
)
def test_short_numbers(value: float, text: str):
    assert short(value) == text


def test_colours_exist_for_light_and_dark():
    css = chart_css()
    assert css.count("--c0:") == 2
    assert "prefers-color-scheme:dark" in css
