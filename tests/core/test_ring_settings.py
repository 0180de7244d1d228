"""What the environment says about rings on GPUs is checked before anything is allocated."""

import pytest

from sidp.errors import ConfigError
from sidp.transport_gpu import _ring_settings, takes_turns


@pytest.mark.parametrize("value", ["-1", "many"])
def test_a_wrong_slice_is_named_with_what_was_expected(monkeypatch, value):
    monkeypatch.setenv("SIDP_SLICE_MB", value)
    with pytest.raises(ConfigError, match=f"SIDP_SLICE_MB='{value}': expected"):
        _ring_settings()


def test_readers_take_turns_where_an_owner_has_several_or_as_the_environment_says(monkeypatch):
    monkeypatch.delenv("SIDP_TURNS", raising=False)
    assert [takes_turns(ranks) for ranks in (2, 3, 8)] == [False, True, True]
    monkeypatch.setenv("SIDP_TURNS", "0")
    assert not takes_turns(8)
    monkeypatch.setenv("SIDP_TURNS", "1")
    assert takes_turns(2)
    monkeypatch.setenv("SIDP_TURNS", "yes")
    with pytest.raises(ConfigError, match="SIDP_TURNS='yes': expected"):
        takes_turns(8)


def test_the_defaults_and_what_is_asked_for(monkeypatch):
    for name in ("SIDP_SLICE_MB", "SIDP_HAND_OVER"):
        monkeypatch.delenv(name, raising=False)
    assert _ring_settings()["slice_bytes"] == 0 and _ring_settings()["hand_over"] == "events"
    monkeypatch.setenv("SIDP_SLICE_MB", "16")
    assert _ring_settings()["slice_bytes"] == 16 << 20
