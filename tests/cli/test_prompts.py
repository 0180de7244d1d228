import json

import pytest

from sidp.cli.prompts import Prompt, load_prompts
from sidp.errors import ConfigError


def test_a_text_file_gives_a_prompt_a_line(tmp_path):
    path = tmp_path / "ask.txt"
    path.write_text("Why?\n\n  Who?  \nWhen?\n")
    prompts, origin = load_prompts(str(path), 2)
    assert prompts == [Prompt("ask.txt:1", "Why?"), Prompt("ask.txt:3", "Who?")]
    assert origin == str(path)


def test_jsonl_takes_strings_and_objects(tmp_path):
    path = tmp_path / "ask.jsonl"
    rows = ["Why?", {"prompt": "Who?", "custom_id": "a"}, {"text": "When?", "id": 7}, {"prompt": "Where?"}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert load_prompts(str(path), 9)[0] == [
        Prompt("ask.jsonl:1", "Why?"),
        Prompt("a", "Who?"),
        Prompt("7", "When?"),
        Prompt("ask.jsonl:4", "Where?"),
    ]


@pytest.mark.parametrize("line", ['{"prompt": 3}', '{"question": "x"}', "[1]", '{"prompt": "x"'])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "ask.jsonl"
    path.write_text(f'"fine"\n{line}\n')
    with pytest.raises(ConfigError, match=r"ask\.jsonl:2"):
        load_prompts(str(path), 9)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "ask.txt"
    path.write_text("\n \n")
    with pytest.raises(ConfigError, match="has no prompt"):
        load_prompts(str(path), 9)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "ask.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_prompts(str(path), 9)


def test_without_a_file_there_are_prompts():
    prompts, origin = load_prompts(None, 5)
    assert len(prompts) == 5 and origin
    assert len({prompt.name for prompt in prompts}) == 5
