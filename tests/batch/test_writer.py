"""The output: whole lines whatever happens, and a resume that loses and repeats nothing wherever the file was cut."""

import json
import os

import pytest

from sidp.batch.records import Defaults
from sidp.batch.spool import Spool, prepare_work
from sidp.batch.writer import Output, prepare, written_keys
from sidp.errors import ConfigError, SidpError


def line(key, text="x"):
    return json.dumps({"id": key, "custom_id": key, "response": {"text": text}}, ensure_ascii=False).encode() + b"\n"


LINES = [line("k0"), line("k1", "newline \\n and } in it"), line("k2", "é" * 5)]
KEYS = {"k0", "k1", "k2", "k3"}


@pytest.mark.parametrize("cut", range(len(b"".join(LINES)) + 1))
def test_resume_after_a_cut_at_every_byte(tmp_path, cut):
    path = tmp_path / "out.jsonl"
    whole = b"".join(LINES)
    path.write_bytes(whole[:cut])
    done = prepare(path, KEYS, resume=True)
    kept = path.read_bytes()
    # What is kept are the first whole lines, all of them, and exactly their keys are done.
    count = len(done)
    assert kept == b"".join(LINES[:count]) and done == {f"k{i}" for i in range(count)}
    assert len(kept) >= whole[:cut].rfind(b"\n") + 1
    # A line that lacks only its newline is kept.
    assert count == next(n for n in range(3, -1, -1) if len(b"".join(LINES[:n])) - (n > 0) <= cut)
    output = Output(path)
    for key in sorted(KEYS - done):
        output.append(line(key))
    output.close()
    assert sorted(json.loads(text)["id"] for text in path.read_bytes().splitlines()) == sorted(KEYS)


@pytest.mark.parametrize("cut", range(len(LINES[0])))
def test_a_line_torn_by_a_dead_rank_is_cut_before_the_next(tmp_path, cut):
    path = tmp_path / "out.jsonl"
    path.write_bytes(LINES[0] + LINES[1][:cut])
    output = Output(path)
    output.append(LINES[2])
    output.close()
    assert path.read_bytes() == LINES[0] + LINES[2]
    assert written_keys(path) == {"k0", "k2"}


def test_a_torn_end_longer_than_a_block(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(LINES[0] + b"x" * 200_000)
    output = Output(path)
    output.append(LINES[1])
    output.close()
    assert path.read_bytes() == LINES[0] + LINES[1]


def test_an_output_that_exists_is_not_touched_unasked(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(LINES[0])
    with pytest.raises(ConfigError, match="--resume"):
        prepare(path, KEYS, resume=False)
    assert path.read_bytes() == LINES[0]
    assert prepare(path, KEYS, resume=False, overwrite=True) == set() and path.read_bytes() == b""
    assert prepare(path, KEYS, resume=False) == set()  # empty, as mktemp makes it
    assert prepare(tmp_path / "new", KEYS, resume=True) == set()


@pytest.mark.parametrize("content", [b"not json\n" + LINES[0], b'{"id": 3}\n', LINES[0] + line("other") + LINES[1]])
def test_a_file_that_is_no_output_of_this_input_is_refused(tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"line [12] of"):
        prepare(path, KEYS, resume=True)
    assert path.read_bytes() == content


def test_bad_targets_are_named(tmp_path):
    for target, text in ((tmp_path, "not a regular file"), (tmp_path / "no" / "x", "does not exist")):
        with pytest.raises(ConfigError, match=text):
            prepare(target, KEYS, resume=False)


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    output = Output(path)
    output.append(LINES[0])
    write, calls = os.write, []

    def half(fd, data):
        if calls:
            raise OSError(28, "No space left on device")
        calls.append(1)
        return write(fd, data[:5])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(SidpError, match=r"No space.*--resume"):
        output.append(LINES[1])
    monkeypatch.undo()
    output.close()
    assert path.read_bytes() == LINES[0]


# ---- from the input and the output to the work ----------------------------------------------------------------------

ROWS = [
    {"prompt": "short"},
    {"custom_id": "a", "prompt": "a much longer prompt " * 20},
    {"custom_id": "a", "prompt": "the same name"},
    {"prompt": "short"},
    {"prompt": "short", "max_tokens": 500},
    {"prompt": 3},
]


def work(tmp_path, **options):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{torn")
    spool = tmp_path / f"spool{len(list(tmp_path.iterdir()))}"
    made = prepare_work(source, output, spool, Defaults(max_tokens=10), **options)
    reader = Spool(spool)
    requests = [reader.request(extent[:2]) for extent in made.extents]
    reader.close()
    return made, requests, output


def test_longest_first_and_bad_rows_answered_at_once(tmp_path):
    made, requests, output = work(tmp_path)
    assert [r.custom_id for r in requests] == ["row-5", "a", "row-1", "row-4"]
    assert (
        [r.cost() for r in requests]
        == [cost for _, _, cost in made.extents]
        == sorted((r.cost() for r in requests), reverse=True)
    )
    answers = [json.loads(text) for text in output.read_bytes().splitlines()]
    codes = [(a["custom_id"], a["response"]["body"]["error"]["code"]) for a in answers]
    assert codes == [("a", "duplicate_custom_id"), ("row-6", "invalid_type"), ("row-7", "invalid_json_line")]
    assert (made.rows, made.done_before, made.refused) == (7, 0, 3)


def test_resume_leaves_exactly_what_is_missing(tmp_path):
    _, requests, output = work(tmp_path)
    with open(output, "ab") as file:
        file.write(line(requests[1].key) + line(requests[2].key)[:-9])
    made, left, _ = work(tmp_path, resume=True)
    assert [r.key for r in left] == [requests[0].key, requests[2].key, requests[3].key]
    assert (made.done_before, made.refused) == (4, 0)
    assert len(output.read_bytes().splitlines()) == 4


def test_the_input_is_never_the_output(tmp_path):
    path = tmp_path / "f"
    path.write_text('{"prompt": "x"}\n')
    with pytest.raises(ConfigError, match="another name"):
        prepare_work(path, path, tmp_path / "s", Defaults(), overwrite=True)
    assert path.read_text() == '{"prompt": "x"}\n'
    path.write_text("\n")
    with pytest.raises(ConfigError, match="no request"):
        prepare_work(path, tmp_path / "o", tmp_path / "s", Defaults())
