"""What a GPU has: datasheet figures cut to what was attained, or a profile that was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError
from ..profile import FFNTimes, MachineProfile

# Of the datasheet's "GB", read as GiB, CUDA offers a little less: 79.11 of 80 on an H100.
_MEMORY_SEEN = 79.11 / 80
# Measured on one H100: 600 of 989 TFLOP/s in the GEMMs of an FFN, 3065 of 3350 GB/s of HBM with large copies.
_FLOPS_ATTAINED = 600 / 989
_HBM_ATTAINED = 3065 / 3350
MEASURED_RATES = ("memory_bytes", "hbm_bytes_per_s", "flops_per_s", "link_bytes_per_s")


@dataclass(frozen=True)
class GPU:
    """Attainable rates of one GPU, not peaks; `source` says where they come from.

    `link_bytes_per_s` is what one reader gets over its link, one way; `round_trip_s` what an empty CaS request takes.
    """

    name: str
    memory_bytes: int
    hbm_bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float
    source: str
    round_trip_s: float = 2e-6
    ffn_times: tuple[FFNTimes, ...] = field(default=(), repr=False)


def _sheet(name: str, gib: int, hbm_tb: float, tflops: float, link_gb: float, attained_gb: float) -> GPU:
    source = (
        f"datasheet ({gib} GB, {hbm_tb:g} TB/s HBM, {tflops:g} dense bf16 TFLOP/s, NVLink {link_gb:g} GB/s one way), "
        f"cut to what was attained: {_HBM_ATTAINED:.0%} of HBM and {_FLOPS_ATTAINED:.0%} of FLOP/s on an H100, "
        f"{attained_gb:g} GB/s of NVLink"
    )
    return GPU(
        name,
        int(gib * 2**30 * _MEMORY_SEEN),
        hbm_tb * 1e12 * _HBM_ATTAINED,
        tflops * 1e12 * _FLOPS_ATTAINED,
        attained_gb * 1e9,
        source,
    )


# NVLink attained: the middle of published copy-engine runs (H100 369-381, H200 379, B200 692-726 GB/s); the H20 has the
# H100's NVLink.
GPUS = {
    "h20": _sheet("h20", 96, 4.0, 148, 450, 375),
    "h20-141": _sheet("h20-141", 141, 4.0, 148, 450, 375),
    "h100": _sheet("h100", 80, 3.35, 989, 450, 375),
    "h200": _sheet("h200", 141, 4.8, 989, 450, 379),
    "b200": _sheet("b200", 180, 7.7, 2250, 900, 709),
}


def load_gpu(name: str, profile: str | None = None) -> GPU:
    """A GPU of the table, or "measured" with the path of a profile. Raises ConfigError."""
    if name == "measured":
        if profile is None:
            raise ConfigError("--gpu measured needs --profile FILE.json with the measured rates")
        return _measured(Path(profile))
    if profile is not None:
        raise ConfigError(f"--profile {profile} goes with --gpu measured, not with --gpu {name}")
    if name not in GPUS:
        raise ConfigError(f"--gpu is {name!r}, expected one of {', '.join(GPUS)}, measured")
    return GPUS[name]


def _measured(path: Path) -> GPU:
    """The profile's GPU; planning needs the four rates, `round_trip_s` and `ffn_times` if there are any."""
    profile = MachineProfile.load(path)
    rates = {key: getattr(profile, key) for key in MEASURED_RATES}
    for key, value in rates.items():
        if not value:
            raise ConfigError(
                f"profile {path}: planning needs {key}, a positive number, and the profile has {value!r}: measure it "
                f"with sidp bench --profile on the GPU to plan for, or write it in"
            )
    if profile.round_trip_s is not None:
        rates["round_trip_s"] = profile.round_trip_s
    return GPU(name=profile.name, source=f"measured, {path.name}", ffn_times=profile.ffn_times, **rates)
