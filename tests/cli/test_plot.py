import pytest

from sidp.errors import ConfigError
from sidp.plot import Stay, forwards, plot_timeline, stays, steady_window

# Two slots, four layers of which 1, 2 and 3 are remote, two forwards of ten seconds each.
TRACE = [
    (kind, layer, slot, start + 10 * forward, end + 10 * forward)
    for forward in range(2)
    for kind, layer, slot, start, end in [
        ("fetch", 1, 0, 0.0, 1.0),
        ("fetch", 2, 1, 1.0, 4.0),
        ("compute", 0, -1, 0.5, 1.5),
        ("compute", 1, 0, 2.0, 3.0),
        ("stall", 2, 1, 3.0, 4.0),
        ("fetch", 3, 0, 4.0, 5.0),
        ("compute", 2, 1, 4.0, 5.0),
        ("compute", 3, 0, 6.0, 7.0),
    ]
]


def test_a_forward_begins_where_the_layer_falls():
    assert forwards(TRACE) == [(0.5, 7.0), (10.5, 17.0)]


def test_each_fetch_is_joined_with_its_own_use():
    assert stays(TRACE)[:3] == [
        Stay(0, 1, 0.0, 1.0, 2.0, 3.0),
        Stay(1, 2, 1.0, 4.0, 4.0, 5.0),
        Stay(0, 3, 4.0, 5.0, 6.0, 7.0),
    ]
    assert len(stays(TRACE)) == 6


def test_a_fetch_nobody_used_yet_ends_with_itself():
    assert stays([("fetch", 5, 0, 1.0, 2.0)]) == [Stay(0, 5, 1.0, 2.0, 2.0, 2.0)]


def test_the_window_covers_the_forwards_asked_for():
    begin, end = steady_window(TRACE, 1)
    assert begin < 10.5 and end > 17.0 and begin > 7.0


@pytest.mark.parametrize("trace", [TRACE, TRACE[:1], [("compute", 0, -1, 0.0, 1.0)]])
def test_a_picture_is_drawn(tmp_path, trace):
    pytest.importorskip("matplotlib")
    path = tmp_path / "timeline.png"
    plot_timeline(trace, str(path), title="a test")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_an_empty_trace_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="start_trace"):
        plot_timeline([], str(tmp_path / "timeline.png"))
