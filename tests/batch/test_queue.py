"""The board: every request to one rank at a time, none lost to a death, none answered twice."""

import itertools
import json
import signal

import pytest

from launch import start
from sidp.batch.queue import Board
from sidp.batch.writer import Output, written_keys
from sidp.errors import ConfigError, LayoutError


def make(tmp_path, ranks, items):
    path = tmp_path / "board"
    Board.create(path, ranks, [(10 * i, i + 1, 5 * i) for i in range(items)])
    return path


def joined(path, rank):
    board = Board(path)
    board.join(rank)
    return board


def key(item):
    return f"k{item}"


def line(item):
    return json.dumps({"id": key(item)}).encode() + b"\n"


def test_items_go_out_in_order_and_once(tmp_path):
    board = joined(make(tmp_path, 2, 5), 0)
    assert board.take(2) == [0, 1] and board.take(0) == [] and board.take(-1) == []
    assert board.extent(3) == (30, 4)
    assert board.counts() == {"free": 3, "taken": 2, "done": 0}
    wrote = []
    assert board.settle(1, lambda: wrote.append(1)) and not board.settle(1, lambda: wrote.append(2))
    assert not board.settle(4, lambda: wrote.append(3)) and wrote == [1]
    assert board.take(9) == [2, 3, 4] and board.take(1) == []
    assert board.counts() == {"free": 0, "taken": 4, "done": 1}


def test_no_more_go_out_than_fit(tmp_path):
    board, told = joined(make(tmp_path, 1, 6), 0), []

    def fitting(costs):
        told.append(costs.tolist())
        return 2

    assert board.take(4, fitting) == [0, 1] and board.take(9, fitting) == [2, 3]
    assert told == [[0, 5, 10, 15], [10, 15, 20, 25]]
    assert board.take(9, lambda costs: 0) == [] and board.counts()["free"] == 2


def test_a_failed_write_leaves_the_item_taken(tmp_path):
    board = joined(make(tmp_path, 1, 1), 0)
    board.take(1)
    with pytest.raises(OSError):
        board.settle(0, lambda: (_ for _ in ()).throw(OSError("full")))
    assert board.counts()["taken"] == 1
    with board.lock(), board.lock():  # released by the error, and its holder may enter again
        pass


def test_figures_of_ranks(tmp_path):
    path = make(tmp_path, 2, 1)
    one, reader = joined(path, 1), Board(path)
    one.report(running=3, kv_tokens=2.0)
    one.add(running=2)
    assert reader.rank_figures(1)["running"] == 5 and reader.rank_figures(0)["joined"] == 0
    with pytest.raises(ConfigError, match="rank 2"):
        reader.join(2)


@pytest.mark.parametrize("damage", [lambda b: b"X" + b[1:], lambda b: b[:-1], lambda b: b[:10], lambda b: b""])
def test_a_damaged_board_is_refused(tmp_path, damage):
    path = make(tmp_path, 2, 3)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LayoutError, match="no board"):
        Board(path)


def drain(ctx, path, output):
    board = joined(path, ctx.rank)
    file = Output(output, board.lock)
    mine = []
    while items := board.take(3):
        for item in items:
            assert board.settle(item, lambda item=item: file.append_locked(line(item)))
            mine.append(item)
    board.report(finished=1)
    return mine


def test_ranks_drain_a_board_together(tmp_path):
    path, output = make(tmp_path, 3, 200), tmp_path / "out"
    with start(drain, 3, path, output, rendezvous="none") as ranks:
        mine = [outcome.value for outcome in ranks.join()]
    assert sorted(itertools.chain(*mine)) == list(range(200))
    assert sorted(json.loads(text)["id"] for text in output.read_text().splitlines()) == sorted(map(key, range(200)))


def hold(ctx, path, output, where):
    """Rank 0 takes four items, answers some, and is killed at `where`."""
    board = joined(path, ctx.rank)
    file = Output(output, board.lock)
    items = board.take(4)
    board.settle(items[0], lambda: file.append_locked(line(items[0])))

    def write_and_wait():
        text = line(items[1])
        if where == "torn":
            with open(output, "ab") as raw:
                raw.write(text[:-4])
        else:
            file.append_locked(text)
        ctx.say("there")
        ctx.hear("never")

    if where != "between":
        board.settle(items[1], write_and_wait)
    ctx.say("there")
    ctx.hear("never")


@pytest.mark.parametrize(("where", "again"), [("between", [1, 2, 3]), ("torn", [1, 2, 3]), ("written", [2, 3])])
def test_what_a_dead_rank_held_is_handed_out_again(tmp_path, where, again):
    path, output = make(tmp_path, 2, 5), tmp_path / "out"
    board = joined(path, 1)
    reap = lambda: board.reap(lambda items: [key(i) for i in items], lambda: written_keys(output))  # noqa: E731
    with start(hold, 1, path, output, where, rendezvous="none") as ranks:
        ranks.wait_for("there")
        assert board.alive(0) and reap() == [] and board.dead_ranks() == []
        ranks.kill(0, signal.SIGKILL)
        ranks.join()
    assert not board.alive(0) and board.dead_ranks() == [0]
    assert reap() == []
    file = Output(output, board.lock)
    items = board.take(9)
    assert items == [*again, 4]
    for item in items:
        assert board.settle(item, lambda item=item: file.append_locked(line(item)))
    assert board.counts() == {"free": 0, "taken": 0, "done": 5}
    assert sorted(json.loads(text)["id"] for text in output.read_text().splitlines()) == sorted(map(key, range(5)))


def take_and_die(ctx, path, rank):
    joined(path, rank).take(1)
    ctx.say("took")
    ctx.hear("never")


def test_a_request_that_killed_two_ranks_is_given_up(tmp_path):
    path = make(tmp_path, 3, 2)
    board = joined(path, 2)
    reap = lambda: board.reap(lambda items: [key(i) for i in items], set)  # noqa: E731
    for rank in (0, 1):
        with start(take_and_die, 1, path, rank, rendezvous="none") as ranks:
            ranks.wait_for("took")
            ranks.kill(0, signal.SIGKILL)
            ranks.join()
        given_up = reap()
        assert given_up == ([] if rank == 0 else [0])
    assert board.settle(0, lambda: None)  # with an error line, which is the caller's
    assert board.take(5) == [1]
