"""Descriptors between ranks: every rank gets every other's, strangers get none, nobody waits for ever."""

from __future__ import annotations

import os
import socket
import struct
import time

import pytest

from launch import parallel_launch

TOKEN = bytes(range(16))
HELLO = int.from_bytes(b"SDPHELLO", "little")


def _file_with(text: bytes) -> int:
    fd = os.memfd_create("sidp-test")
    os.write(fd, text)
    return fd


def _pass_around(ctx, strangers):
    from sidp._native import C
    from sidp.control import ControlPlane

    plane = ControlPlane(None, 30.0)
    exchange = C.DescriptorExchange(ctx.rank, ctx.world_size, plane.token)
    addresses = plane.exchange("addresses", exchange.address)
    guests = []
    if strangers:
        for message in (b"", b"x" * 32, struct.pack("<Q16sii", HELLO, TOKEN, 0, ctx.world_size)):
            guest = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            guest.connect(addresses[(ctx.rank + 1) % ctx.world_size])
            if message:
                guest.send(message)
            guests.append(guest)
    own = _file_with(f"from rank {ctx.rank}".encode())
    received = exchange.run(own, addresses, 20.0)
    texts = [os.pread(d.fd, 64, 0).decode() if rank != ctx.rank else d.fd for rank, d in enumerate(received)]
    fds = [d.fd for d in received if d.fd >= 0]
    inherited = [os.get_inheritable(fd) for fd in fds]
    for descriptor in received:
        descriptor.close()
    still_open = [fd for fd in fds if os.path.exists(f"/proc/self/fd/{fd}")]
    plane.barrier("all have theirs")
    with open("/proc/net/unix") as table:
        left = exchange.address[1:].decode() in table.read()
    got = []
    for guest in guests:
        guest.settimeout(5)
        _, ancillary, _, _ = guest.recvmsg(64, 64)
        got.append(len(ancillary))
        guest.close()
    plane.close()
    return texts, any(inherited), still_open, left, got


@pytest.mark.parametrize("strangers", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_everyone_gets_everyones_descriptor_and_strangers_none(world_size, strangers):
    for rank, (texts, inherited, still_open, left, got) in enumerate(
        parallel_launch(_pass_around, world_size, strangers)
    ):
        assert texts == [f"from rank {other}" if other != rank else -1 for other in range(world_size)]
        assert not inherited and not still_open and not left
        assert got == ([0, 0, 0] if strangers else [])


def test_a_rank_that_does_not_come_is_named_in_time():
    from sidp import SidpError
    from sidp._native import C

    exchange, silent = C.DescriptorExchange(0, 2, TOKEN), C.DescriptorExchange(1, 2, TOKEN)
    own, begin = _file_with(b""), time.monotonic()
    with pytest.raises(SidpError, match=r"rank\(s\) 1 within 0.3 s"):
        exchange.run(own, [exchange.address, silent.address], 0.3)
    assert time.monotonic() - begin < 20
    os.close(own)


@pytest.mark.parametrize(
    ("address", "words"),
    [(b"", "of 0 bytes"), (b"x" * 61, "of 61 bytes"), (b"\0sidp-nobody-here", "cannot be reached")],
)
def test_an_address_that_leads_nowhere_is_named(address, words):
    from sidp import SidpError
    from sidp._native import C

    exchange = C.DescriptorExchange(0, 2, TOKEN)
    own = _file_with(b"")
    with pytest.raises(SidpError, match=words):
        exchange.run(own, [exchange.address, address], 1.0)
    os.close(own)
