"""Rows in: what is accepted, what is refused and how that reads."""

import json

import pytest

from sidp.batch.reading import read_rows
from sidp.batch.records import BadRow, Defaults, parse_row
from sidp.batch.responses import Answer, error_line, row_error_line, success_line
from sidp.errors import ConfigError

DEFAULTS = Defaults(max_tokens=32)


def parse(fields, number=1, defaults=DEFAULTS):
    raw = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return parse_row(raw, number, defaults)


def batch_line(body, **more):
    return {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body, **more}


def test_a_chat_line():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    row = parse(batch_line({"model": "m", "messages": messages, "max_completion_tokens": 5, "temperature": 1,
                            "top_p": 0.5, "seed": 7, "stop": "END", "n": 1, "stream": False},
                           url="/v1/chat/completions"))  # fmt: skip
    request = row.request
    assert row.error is None and row.custom_id == "a" and row.explicit
    assert request.messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert (request.max_tokens, request.max_tokens_given) == (5, True)
    assert (request.temperature, request.top_p, request.seed, request.stop) == (1.0, 0.5, 7, ("END",))
    assert type(request).from_json(request.to_json()) == request


def test_plain_lines():
    row = parse({"prompt": "hi", "answer": 42}, number=9)
    assert row.custom_id == "row-9" and not row.explicit
    assert row.request.prompt == "hi" and row.request.url == "/v1/completions"
    assert (row.request.max_tokens, row.request.max_tokens_given, row.request.temperature) == (32, False, 0.0)
    assert parse({"task_id": "HumanEval/0", "prompt": "x"}).custom_id == "HumanEval/0"
    assert parse({"id": 3, "messages": [{"role": "user", "content": "x"}]}).request.url == "/v1/chat/completions"
    chat = parse({"prompt": "hi"}, defaults=Defaults(chat=True)).request
    assert chat.messages == [{"role": "user", "content": "hi"}] and chat.prompt is None
    assert parse({"prompt": [1, 2, 3]}).request.prompt == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "param", "code"),
    [
        (b"{", None, "invalid_json_line"),
        (b"\xff\xfe", None, "invalid_json_line"),
        (b"[1]", None, "invalid_json_line"),
        (b"[" * 100_000, None, "invalid_json_line"),
        ({}, "prompt", "missing_required_parameter"),
        ({"body": {"prompt": "x"}}, "custom_id", "missing_required_parameter"),
        (batch_line({"prompt": "x"}, custom_id=""), "custom_id", "invalid_type"),
        (batch_line("not json"), None, "invalid_json_line"),
        (batch_line(3), "body", "invalid_type"),
        (batch_line({"prompt": "x"}, method="GET"), "method", "invalid_method"),
        (batch_line({"prompt": "x"}, url="/v1/embeddings"), "url", "invalid_url"),
        (batch_line({"prompt": ""}), "prompt", "invalid_type"),
        (batch_line({"prompt": ["a", "b"]}), "prompt", "invalid_type"),
        (batch_line({"prompt": [1, -1]}), "prompt", "invalid_type"),
        (batch_line({"prompt": [1, True]}), "prompt", "invalid_type"),
        (batch_line({"messages": []}, url="/v1/chat/completions"), "messages", "invalid_type"),
        (
            batch_line({"messages": [{"role": "user"}]}, url="/v1/chat/completions"),
            "messages[0].content",
            "invalid_type",
        ),
        (
            batch_line(
                {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, url="/v1/chat/completions"
            ),
            "messages[0].content",
            "unsupported_value",
        ),
        (batch_line({"prompt": "x", "max_tokens": 0}), "max_tokens", "integer_out_of_range"),
        (batch_line({"prompt": "x", "max_tokens": "4"}), "max_tokens", "invalid_type"),
        (batch_line({"prompt": "x", "temperature": 2.5}), "temperature", "decimal_out_of_range"),
        (batch_line({"prompt": "x", "temperature": True}), "temperature", "invalid_type"),
        (batch_line({"prompt": "x", "top_p": float("nan")}), "top_p", "invalid_type"),
        (batch_line({"prompt": "x", "seed": float("inf")}), "seed", "invalid_type"),
        (batch_line({"prompt": "x", "stop": ["a", 1]}), "stop", "invalid_type"),
        (batch_line({"prompt": "x", "n": 2}), "n", "unsupported_parameter"),
        (batch_line({"prompt": "x", "logprobs": True}), "logprobs", "unsupported_parameter"),
        (batch_line({"prompt": "x", "tools": [{}]}), "tools", "unsupported_parameter"),
        (batch_line({"prompt": "x", "temprature": 1}), "temprature", "unknown_parameter"),
    ],
)
def test_refused_rows_say_what_and_where(line, param, code):
    row = parse(line, number=12)
    assert row.request is None and (row.error.param, row.error.code) == (param, code)
    answer = json.loads(row_error_line(row))
    error = answer["response"]["body"]["error"]
    assert answer["id"] == row.key and answer["response"]["status_code"] == 400
    assert error["type"] == "invalid_request_error" and error["param"] == param and error["code"] == code
    assert error["message"].startswith("line 12: ") and answer["error"] == {"code": code, "message": error["message"]}


def test_keys_tell_rows_apart_and_survive_a_second_reading():
    line = json.dumps({"prompt": "x"}).encode()
    keys = {parse_row(line, number, DEFAULTS, occurrence).key for number, occurrence in ((1, 0), (2, 1), (2, 0))}
    assert len(keys) == 3
    assert parse_row(line, 1, DEFAULTS).key == parse_row(line + b" \r\n", 1, DEFAULTS).key
    assert parse({"custom_id": "\ud800", "prompt": "x"}).error is None  # half a pair has no UTF-8


def test_rows_without_a_seed_draw_apart_but_the_same_again():
    one, two = parse({"prompt": "x"}, 1).request, parse({"prompt": "x"}, 2).request
    assert one.seed != two.seed and one.seed == parse({"prompt": "x"}, 1).request.seed
    assert one.seed != parse({"prompt": "x"}, 1, Defaults(seed=1)).request.seed


def test_answers_have_openais_form():
    request = parse(batch_line({"prompt": "x", "model": "m"})).request
    line = json.loads(success_line(request, Answer("text\u2028\ud800", "length", 3, 4), "served"))
    body = line["response"]["body"]
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("a", None, 200)
    assert (body["object"], body["model"], body["choices"][0]["finish_reason"]) == ("text_completion", "m", "length")
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert success_line(request, Answer("a\nb", "stop", 1, 1), "s").count(b"\n") == 1
    failed = json.loads(error_line("k", "a", BadRow("died", None, "server_error"), 500))
    assert failed["response"]["body"]["error"]["type"] == "server_error"


def test_jsonl_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b"}')
    rows = list(read_rows(path))
    assert [number for number, _ in rows] == [1, 4]
    assert [parse_row(raw, number, DEFAULTS).request.prompt for number, raw in rows] == ["a", "b"]
    with pytest.raises(ConfigError, match="No such file"):
        list(read_rows(tmp_path / "none"))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"
    columns = {
        "custom_id": ["a", None, "c"],
        "prompt": ["x", "y", None],
        "max_tokens": [3, None, 4],
        "messages": [None, None, [{"role": "user", "content": "hi"}]],
        "meta": [None, {"k": 1}, None],
    }
    parquet.write_table(pyarrow.table(columns), path)
    rows = [parse_row(raw, number, DEFAULTS) for number, raw in read_rows(path)]
    assert [row.error for row in rows] == [None] * 3
    assert [row.custom_id for row in rows] == ["a", "row-2", "c"]
    assert [row.request.max_tokens for row in rows] == [3, 32, 4]
    assert rows[2].request.messages == [{"role": "user", "content": "hi"}]
    body = json.dumps({"prompt": "z"})
    parquet.write_table(pyarrow.table({"custom_id": ["a"], "body": [body]}), path)
    assert [parse_row(raw, n, DEFAULTS).request.prompt for n, raw in read_rows(path)] == ["z"]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ConfigError, match="not a readable Parquet"):
        list(read_rows(path))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    import sys

    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1....PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"sidp\[batch\]"):
        list(read_rows(path))
