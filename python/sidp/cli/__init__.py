"""The `sidp` command. Each subcommand is a module of this package with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..errors import SidpError
from ..launch import RankFailed

# name -> what it does, in one line. The module of that name (- as _) is imported when the command is parsed;
# it must not import torch before `run`.
COMMANDS = {
    "demo": "answer prompts over a pool of FFN weights on this machine, and check every token",
    "run-batch": "answer a file of requests (OpenAI batch lines or prompts) over a pool of FFN weights",
    "plan": "say what pooling would bring for a model on a node: KV cache, batch, when fetches are hidden",
    "bench": "measure copies, links, overlap and opening times here, and write a profile for plan and policy",
    "simulate": "run whole jobs in simulated time: replicas, pools, pipelines, and the paper's experiments",
    "doctor": "say what this machine can do for a pool, what sidp chooses, and why",
}

DESCRIPTION = """\
Pool the FFN weights of a data-parallel inference group: every rank keeps a share and
fetches each layer's FFN just before it is needed, so that the rest of the memory can
hold KV cache. The tokens do not change."""

EPILOG = """\
start here:
  sidp doctor                         what this machine offers
  sidp demo                           SmolLM2-135M over two ranks, checked against the unpooled model
  sidp demo --model random --dp 4     a tiny random model, nothing to download
  sidp plan --model Llama-3.1-70B --gpu h200 --dp 8     what a pool would bring there

`sidp COMMAND --help` tells more. Exit codes: 0 all is well, 1 a check or a rank failed, 2 bad usage."""


class _Parser(argparse.ArgumentParser):
    """Errors are one line and exit code 2, without the usage block in front."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; cheap, so that `--help` answers at once."""
    parser = _Parser(
        prog="sidp", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"sidp {_version()}")
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", parser_class=_Parser)
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
        command = subparsers.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.run(args)
    except RankFailed as error:
        if error.detail:
            print(error.detail.rstrip(), file=sys.stderr)
        return _fail(args.command, error, 1)
    except SidpError as error:
        return _fail(args.command, error, 2)
    except KeyboardInterrupt:
        print(f"sidp {args.command}: interrupted; every rank was ended", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (`| head`) has gone
        sys.stderr.close()
        return 1


def _fail(command: str, error: Exception, code: int) -> int:
    message = " ".join(str(error).split())
    print(f"sidp {command}: error: {message}", file=sys.stderr)
    return code


def _version() -> str:
    from .. import __version__

    return __version__
