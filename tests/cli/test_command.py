"""The `sidp` command as a shell sees it: help, version, errors in one line, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import sidp


def run(*words, timeout=120, **env):
    return subprocess.run(
        [sys.executable, "-m", "sidp.cli", *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **env},
    )


def assert_one_line_error(ran, *parts):
    assert ran.returncode == 2, ran.stderr
    lines = ran.stderr.strip().splitlines()
    assert len(lines) == 1, ran.stderr
    for part in ("error: ", *parts):
        assert part in lines[0]


def test_version_is_the_packages():
    assert run("--version").stdout == f"sidp {sidp.__version__}\n"


def test_help_names_every_command_and_needs_no_torch():
    ran = run("--help")
    assert ran.returncode == 0
    assert "demo" in ran.stdout and "doctor" in ran.stdout
    code = "import sys, sidp.cli; sidp.cli.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["wat"], "wat"),
        (["demo", "--dp", "0"], "'0'"),
        (["demo", "--max-new-tokens", "-3"], "-3"),
        (["demo", "--placement", "round"], "round"),
        (["demo", "--model", "/nowhere/model"], "/nowhere/model"),
        (["demo", "--model", "random", "--prompts", "/nowhere/prompts"], "/nowhere/prompts"),
        (["demo", "--model", "random", "--plot", "/nowhere/x.png"], "/nowhere"),
        (["demo", "--model", "random", "--plot", "x.txt"], ".png"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(words, part):
    assert_one_line_error(run(*words), part)


def test_doctor_finds_this_machine_fit():
    ran = run("doctor", "--json")
    findings = {finding["subject"]: finding for finding in json.loads(ran.stdout)}
    assert ran.returncode == 0, ran.stdout
    assert findings["native module"]["level"] == "ok"
    assert findings["backend"]["text"].startswith(("CPU", "CUDA"))
    assert "/dev/shm" in findings["shared memory"]["text"]


def test_doctor_fails_without_the_native_module(tmp_path):
    ran = run("doctor", SIDP_EXTENSION_DIR=str(tmp_path))
    assert ran.returncode == 1
    assert "fail  native module" in ran.stdout


def _group_is_gone(group, deadline_s):
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process(number):
    words = ["demo", "--model", "random", "--max-new-tokens", "4000", "--max-prompts", "2"]
    demo = subprocess.Popen(
        [sys.executable, "-u", "-m", "sidp.cli", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        seen = b""
        while b"pooled:" not in seen:  # the ranks are generating
            chunk = demo.stderr.read1()
            assert chunk, seen
            seen += chunk
        if number == signal.SIGINT:
            os.killpg(demo.pid, number)  # as a terminal does it
        else:
            demo.send_signal(number)
        demo.stderr.read()
        assert demo.wait(30) == (130 if number == signal.SIGINT else 143)
        assert _group_is_gone(demo.pid, 15)
    finally:
        if not _group_is_gone(demo.pid, 0.1):
            os.killpg(demo.pid, signal.SIGKILL)
        demo.stderr.close()
