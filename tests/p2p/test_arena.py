"""Arenas and mappings within one process: the words, the checks, the refusals."""

from __future__ import annotations

import ctypes
import os
import secrets
import stat
import struct
import subprocess

import pytest

from sidp._native import C
from sidp.errors import ConfigError, LayoutError, PeerError, PoolClosedError, SidpError

TOKEN = bytes(range(16))
EXTENT_BYTES = 10_000
MAILBOX_BYTES = 300
# Offsets in the handle record (csrc/p2p/handle.cpp); everything is little-endian.
VERSION, KIND, RANK, WORLD, JOB, TOTAL, EXTENTS, PID, START, UID, FD, INODE, BOOT, NAME, SUM = (
    8, 12, 16, 20, 24, 40, 48, 80, 88, 104, 108, 120, 128, 160, 312,
)  # fmt: skip


def make(kind="memfd", directory="/dev/shm", rank=1, extent_bytes=EXTENT_BYTES):
    return C.ShmArena(
        rank=rank,
        world_size=4,
        token=TOKEN,
        extent_bytes=extent_bytes,
        mailbox_bytes=MAILBOX_BYTES,
        kind=kind,
        directory=str(directory),
    )


def open_(handle, directory="/dev/shm", **changed):
    expected = dict(rank=1, world_size=4, token=TOKEN, extent_bytes=EXTENT_BYTES, mailbox_bytes=MAILBOX_BYTES)
    return C.PeerMapping(handle, directory=str(directory), **{**expected, **changed})


def forge(handle, offset, fmt, value):
    """The handle with one field changed and its checksum made to match."""
    record = bytearray(handle)
    struct.pack_into("<" + fmt, record, offset, value)
    total = 0xCBF29CE484222325
    for byte in record[:SUM]:
        total = ((total ^ byte) * 0x100000001B3) % (1 << 64)
    struct.pack_into("<Q", record, SUM, total)
    return bytes(record)


def write(address, data):
    ctypes.memmove(address, data, len(data))


def names(directory):
    return [name for name in os.listdir(directory) if name.startswith("sidp.")]


@pytest.fixture(params=["memfd", "named"])
def kind(request):
    return request.param


@pytest.fixture
def arena(kind, tmp_path):
    arena = make(kind, tmp_path)
    yield arena
    arena.close()


def test_a_mapping_carries_bytes_both_ways(arena, tmp_path):
    mapping = open_(arena.handle(), tmp_path)
    assert mapping.extents != arena.extents
    assert ctypes.string_at(mapping.extents, EXTENT_BYTES) == bytes(EXTENT_BYTES)
    data = secrets.token_bytes(EXTENT_BYTES)
    write(arena.extents, data)
    assert ctypes.string_at(mapping.extents, EXTENT_BYTES) == data
    write(mapping.mailboxes, b"x" * MAILBOX_BYTES)
    assert ctypes.string_at(arena.mailboxes, MAILBOX_BYTES) == b"x" * MAILBOX_BYTES
    assert ctypes.string_at(arena.extents, EXTENT_BYTES) == data


def test_the_memory_outlives_names_and_owner(arena, tmp_path):
    write(arena.extents, b"kept")
    mapping = open_(arena.handle(), tmp_path)
    arena.unlink()
    arena.unlink()
    assert names(tmp_path) == []
    arena.close()
    assert ctypes.string_at(mapping.extents, 4) == b"kept"
    assert mapping.phase == "closed"


def test_phases_only_grow(arena, tmp_path):
    mapping = open_(arena.handle(), tmp_path)
    seen = [mapping.phase]
    for phase in ("committed", "created", "finished", "committed"):
        arena.set_phase(phase)
        seen.append(mapping.phase)
    assert seen == ["created", "committed", "committed", "finished", "finished"]
    with pytest.raises(ConfigError, match="'sleeping'"):
        arena.set_phase("sleeping")


def test_only_the_user_may_open_it(arena, kind, tmp_path):
    if kind == "memfd":
        fd = struct.unpack_from("<i", arena.handle(), FD)[0]
        mode = os.fstat(fd).st_mode
    else:
        mode = os.stat(tmp_path / names(tmp_path)[0]).st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_names_cannot_be_guessed_and_memfd_has_none(tmp_path):
    before = set(os.listdir("/dev/shm"))
    with_name, other = make("named", tmp_path), make("named", tmp_path)
    without = make("memfd")
    first, second = names(tmp_path)
    assert first.rsplit(".", 1)[1] != second.rsplit(".", 1)[1]
    assert len(first.rsplit(".", 1)[1]) == 32
    assert set(os.listdir("/dev/shm")) == before
    del with_name, other, without
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("expectation", "reason"),
    [
        ({"rank": 2}, "rank is 1, expected 2"),
        ({"world_size": 8}, "world size is 4, expected 8"),
        ({"token": bytes(16)}, "job token"),
        ({"extent_bytes": EXTENT_BYTES + 1}, "size of the extents is 10000, expected 10001"),
        ({"mailbox_bytes": 0}, "size of the mailboxes is 300, expected 0"),
    ],
)
def test_a_handle_that_is_not_the_expected_one_is_refused(arena, tmp_path, expectation, reason):
    with pytest.raises(LayoutError, match=reason):
        open_(arena.handle(), tmp_path, **expectation)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h[:-1], "319 bytes, expected 320"),
        (lambda h: h + b"\0", "321 bytes"),
        (lambda h: b"", "0 bytes"),
        (lambda h: b"X" + h[1:], "magic"),
        (lambda h: h[:50] + bytes([h[50] ^ 1]) + h[51:], "checksum"),
        (lambda h: forge(h, VERSION, "I", 99), "version 99, expected 1"),
        (lambda h: forge(h, KIND, "I", 7), "transport kind 7"),
        (lambda h: forge(h, EXTENTS, "Q", 1 << 63), "areas outside"),
        (lambda h: forge(h, EXTENTS + 8, "Q", (1 << 64) - 1), "areas outside"),
        (lambda h: forge(h, PID, "q", -1), "pid -1"),
        (lambda h: forge(h, UID, "I", os.geteuid() + 1), "user id"),
        (lambda h: forge(h, BOOT, "32s", b"0" * 32), "a pool spans one host"),
        (lambda h: forge(h, TOTAL, "Q", 1 << 40), "in 1099511627776 bytes, expected"),
        (lambda h: forge(h, INODE, "Q", 1), "the handle names"),
        (lambda h: forge(h, START, "Q", 1), "names another process"),
    ],
)
def test_forged_handles_are_refused_with_the_reason(arena, tmp_path, change, reason):
    with pytest.raises(LayoutError, match=reason):
        open_(change(arena.handle()), tmp_path)


def test_a_name_cannot_lead_elsewhere(tmp_path):
    arena = make("named", tmp_path)
    for name in (b"../etc/passwd", b"sidp./../x", b"other.file"):
        with pytest.raises(LayoutError, match="letters, digits"):
            open_(forge(arena.handle(), NAME, "112s", name), tmp_path)
    path = tmp_path / names(tmp_path)[0]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PeerError, match="cannot open"):
        open_(arena.handle(), tmp_path)
    path.unlink()


def test_an_object_that_changed_under_its_name_is_refused(tmp_path):
    arena = make("named", tmp_path)
    path = tmp_path / names(tmp_path)[0]
    path.chmod(0o644)
    with pytest.raises(LayoutError, match="expected 0600"):
        open_(arena.handle(), tmp_path)
    path.chmod(0o600)
    size = path.stat().st_size
    os.truncate(path, size - 4096)
    with pytest.raises(LayoutError, match="the handle says"):
        open_(arena.handle(), tmp_path)
    os.truncate(path, size)
    with open(path, "r+b") as file:
        file.seek(32)
        file.write(b"another job's token")
    with pytest.raises(LayoutError, match="another job's token"):
        open_(arena.handle(), tmp_path)


def test_a_memfd_cannot_shrink_under_a_reader():
    arena = make("memfd")
    fd = struct.unpack_from("<i", arena.handle(), FD)[0]
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)


def test_another_descriptor_of_the_owner_is_refused():
    arena = make("memfd")
    with open(__file__, "rb") as other, pytest.raises((LayoutError, PeerError), match="rank 1"):
        open_(forge(arena.handle(), FD, "i", other.fileno()))
    with pytest.raises(PeerError, match="cannot open the arena of rank 1") as caught:
        open_(forge(arena.handle(), FD, "i", 1 << 20))
    assert caught.value.rank == 1


def test_closed_objects_say_so(arena, tmp_path):
    mapping = open_(arena.handle(), tmp_path)
    mapping.close()
    mapping.close()
    with pytest.raises(PoolClosedError, match="rank 1"):
        _ = mapping.extents
    arena.unlink()
    with pytest.raises(PoolClosedError, match="no longer published"):
        arena.handle()
    arena.close()
    arena.close()
    with pytest.raises(PoolClosedError):
        _ = arena.extents


def test_more_memory_than_there_is_names_needed_and_available():
    needed = C.available_memory() + (1 << 40)
    with pytest.raises(ConfigError, match=r"needs \d+ bytes .* but \d+ bytes are available"):
        make("memfd", extent_bytes=needed)
    with pytest.raises(ConfigError, match="at most"):
        make("memfd", extent_bytes=1 << 63)


def test_a_small_dev_shm_is_refused_before_the_first_touch(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(ConfigError, match=r"needs \d+ bytes in .*, but 1048576 bytes are.*--shm-size"):
            make("named", tmp_path, extent_bytes=2 << 20)
        assert os.listdir(tmp_path) == []
        first = make("named", tmp_path, extent_bytes=600_000)
        with pytest.raises(ConfigError, match="bytes are free"):  # reserved, not only promised
            make("named", tmp_path, extent_bytes=600_000)
        assert len(os.listdir(tmp_path)) == 1
        first.close()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_sweep_takes_only_what_the_dead_left(tmp_path):
    own = C.ProcessIdentity.current()
    gone = subprocess.Popen(["true"])
    gone.wait()
    mine = make("named", tmp_path)
    living = names(tmp_path)[0]
    fields = living.split(".")
    dead = ".".join([*fields[:3], str(gone.pid), *fields[4:]])
    elsewhere = ".".join([*fields[:2], str(own.pid_namespace + 1), str(gone.pid), *fields[4:]])
    stranger = ".".join([fields[0], str(own.uid + 1), fields[2], str(gone.pid), *fields[4:]])
    for name in (dead, elsewhere, stranger, "sidp.conf"):
        (tmp_path / name).touch()
    assert C.sweep_names(str(tmp_path)) == 1
    assert sorted(os.listdir(tmp_path)) == sorted([living, elsewhere, stranger, "sidp.conf"])
    mine.close()


def test_arguments_are_checked():
    with pytest.raises(ConfigError, match="'tape'"):
        make("tape")
    with pytest.raises(ConfigError, match="job token has 16 bytes, got 3"):
        C.ShmArena(rank=0, world_size=1, token=b"abc", extent_bytes=1)
    with pytest.raises(ConfigError, match="rank 4 is outside"):
        C.ShmArena(rank=4, world_size=4, token=TOKEN, extent_bytes=1)
    with pytest.raises(ConfigError, match="tmpfs"):
        make("named", "/nonexistent")
    assert issubclass(ConfigError, SidpError)
