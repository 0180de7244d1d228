"""A share in two memories: what fits stays on the device, the rest is the overflow in pinned host memory.

The cut runs between two extents of a rank's share, in the order in which they lie in it, so that every extent is whole on
one side. Offsets go on counting through both parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def cut_of(placement, rank: int, layers: int, device_bytes: int) -> int:
    """Bytes of ``rank``'s share that stay on the device: the most whole extents that ``device_bytes`` hold."""
    extents = sorted(
        (placement.share(layer, rank).offset, placement.share(layer, rank).bytes) for layer in range(layers)
    )
    ends = [offset + nbytes for offset, nbytes in extents if nbytes]
    return max((end for end in ends if end <= device_bytes), default=0)


def on_device(placement, rank: int, layer: int, cut: int) -> bool:
    """Whether the rank's extent of ``layer`` lies before the cut."""
    extent = placement.share(layer, rank)
    return extent.offset + extent.bytes <= cut


@dataclass
class SplitMemory:
    """The two parts of a share as uint8 tensors; the host part begins at offset ``device.numel()``."""

    device: torch.Tensor
    host: torch.Tensor

    def part(self, offset: int) -> tuple[torch.Tensor, int]:
        """The memory that holds what begins at ``offset``, and where in it."""
        cut = self.device.numel()
        return (self.device, offset) if offset < cut else (self.host, offset - cut)


def part_of(memory: torch.Tensor | SplitMemory, offset: int) -> tuple[torch.Tensor, int]:
    """``SplitMemory.part``; memory in one piece is that piece."""
    return memory.part(offset) if isinstance(memory, SplitMemory) else (memory, offset)
