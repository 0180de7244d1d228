"""What the environment says about rings on GPUs is checked before anything is allocated."""

import pytest

from sidp.errors import ConfigError
from sidp.transport_gpu import _ring_settings

WRONG = {"SIDP_SLICE_MB": ("-1", "many"), "SIDP_COPY_LANES": ("0", "2.5", "17")}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_setting_is_named_with_what_was_expected(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}='{value}': expected"):
        _ring_settings()


def test_the_defaults_and_what_is_asked_for(monkeypatch):
    for name in ("SIDP_SLICE_MB", "SIDP_COPY_LANES", "SIDP_HAND_OVER"):
        monkeypatch.delenv(name, raising=False)
    assert _ring_settings()["copy_lanes"] == 1 and _ring_settings()["slice_bytes"] == 0
    monkeypatch.setenv("SIDP_COPY_LANES", "3")
    monkeypatch.setenv("SIDP_SLICE_MB", "16")
    assert _ring_settings()["copy_lanes"] == 3 and _ring_settings()["slice_bytes"] == 16 << 20
