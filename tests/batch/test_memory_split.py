"""Even parts of a shared device: real processes with a made-up device, and the arithmetic of what fits."""

import multiprocessing
import os
import time
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

from sidp.batch import memory  # noqa: E402
from sidp.batch.memory import activation_bytes, cache_bytes, kv_bytes_per_token, logit_bytes, share_of_device  # noqa: E402
from sidp.batch.queue import Board  # noqa: E402
from sidp.errors import ConfigError  # noqa: E402

TOTAL, LOADED, UUIDS = 80 * 10**9, 11 * 10**9, ("f00d0000-0000-0000-0000-00000000000a", "f00d-00000000000b")


def fake_device(folder, uuid):
    """A device whose use is the sum of the files in `folder`; each rank adds its own."""

    def used(_=None):
        return sum(int(path.read_text()) for path in folder.iterdir() if path.suffix == ".used")

    torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=uuid, name="a made-up GPU")
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
    torch.cuda.mem_get_info = lambda device: (TOTAL - used(), TOTAL)


def rank_main(board, rank, folders, delays, dies, replies):
    gpu = rank % len(folders)
    joined = Board(board)
    joined.join(rank)
    fake_device(folders[gpu], UUIDS[gpu])
    time.sleep(delays[rank])
    if dies == rank:
        os._exit(9)
    (folders[gpu] / f"{rank}.used").write_text(str(LOADED))
    share = share_of_device(joined, torch.device("cuda", 0), 0.9)
    (folders[gpu] / f"cache{rank}.used").write_text(str(share.left))  # as soon as it may
    replies.put((rank, share.left, share.ranks))
    joined.report(finished=1)
    replies.close()
    replies.join_thread()
    time.sleep(0.2)


@pytest.mark.parametrize(
    "gpus, dies, expected",
    [
        (1, None, {rank: (int(0.9 * TOTAL) - 3 * LOADED) // 3 for rank in range(3)}),
        (2, None, {0: (int(0.9 * TOTAL) - 2 * LOADED) // 2, 1: int(0.9 * TOTAL) - LOADED, 2: (int(0.9 * TOTAL) - 2 * LOADED) // 2}),
        (1, 1, {rank: (int(0.9 * TOTAL) - 2 * LOADED) // 2 for rank in (0, 2)}),
    ],
    ids=["one device", "two devices", "a rank dies while it loads"],
)  # fmt: skip
def test_ranks_get_even_parts_whoever_loads_first(tmp_path, gpus, dies, expected):
    folders = [tmp_path / f"gpu{n}" for n in range(gpus)]
    for folder in folders:
        folder.mkdir()
    Board.create(tmp_path / "board", 3, [(0, 1, 1)])
    context = multiprocessing.get_context("fork")
    replies = context.Queue()
    delays = [0.0, 0.5, 0.25]
    arguments = [(tmp_path / "board", rank, folders, delays, dies, replies) for rank in range(3)]
    processes = [context.Process(target=rank_main, args=each) for each in arguments]
    for process in processes:
        process.start()
    try:
        got = {}
        for _ in expected:
            rank, left, sharers = replies.get(timeout=60)
            got[rank] = left
            assert sharers == sum(1 for other in expected if other % gpus == rank % gpus)
    finally:
        for process in processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
    assert got == expected


def test_weights_that_leave_nothing_are_refused_by_name(tmp_path, monkeypatch):
    Board.create(tmp_path / "board", 1, [(0, 1, 1)])
    board = Board(tmp_path / "board")
    board.join(0)
    for name in ("get_device_properties", "synchronize", "empty_cache", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))
    fake_device(tmp_path, UUIDS[0])
    (tmp_path / "0.used").write_text(str(int(0.95 * TOTAL)))
    with pytest.raises(ConfigError, match=r"does not fit.*76\.0 GB of a made-up GPU.*0\.9 allows 72\.0 GB"):
        share_of_device(board, torch.device("cuda", 0), 0.9)
    board.close()


def model(**fields):
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=30_000, **fields,
    )  # fmt: skip
    return SimpleNamespace(config=config, dtype=torch.bfloat16)


def test_cache_and_step_fit_what_is_left_and_a_page_more_would_not():
    made, page = model(), memory.SPARE_PAGES * 16
    token = kv_bytes_per_token(made)
    assert token == 2 * 6 * 2 * 64 * 2
    generator = torch.Generator().manual_seed(int(time.time()))
    for _ in range(200):
        left = int(torch.randint(20 * 2**20, 2**34, (1,), generator=generator))
        rows, mean_cost = (int(torch.randint(16, 2000, (1,), generator=generator)) for _ in range(2))
        max_batch = None if left % 2 else 1 + left % 300
        try:
            cache = cache_bytes(made, left, rows, page, mean_cost, max_batch, flash=True)
        except ConfigError:
            cache = 0
        assert cache % (page * token) == 0

        def needed(cache, mean_cost=mean_cost, max_batch=max_batch, rows=rows):
            tokens = cache / token + memory.SPARE_PAGES * page
            sampled = tokens / mean_cost if max_batch is None else min(max_batch, rows)
            step = max(activation_bytes(rows, 512, 1024, 2), sampled * logit_bytes(30_000, 2))
            return tokens * (token + token / 6 + 16) + step

        assert cache == 0 or needed(cache) <= left
        assert needed(cache + 2 * page * token) > left


def test_attention_by_sdpa_leaves_less_and_nothing_is_refused():
    made = model()
    flash, sdpa = (cache_bytes(made, 2**30, 512, 32, 100, 64, flash=flash) for flash in (True, False))
    assert sdpa < 0.75 * flash
    with pytest.raises(ConfigError, match="does not fit"):
        cache_bytes(made, 2**20, 512, 32, 100, 64, flash=True)
