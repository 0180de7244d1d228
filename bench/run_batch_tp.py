"""`sidp run-batch --no-pool --load-format dummy` whose replicas are groups of T GPUs with tensor parallelism.

    python bench/run_batch_tp.py --tp 2 -i IN -o OUT --model Llama-3.1-70B --load-format dummy --dp 4 --no-pool ...

For bench/run_batch_gpu.py: the same engine, requests and summary; --dp counts GPUs, a process each: this is TP=2 x DP=2. A process
has a slice of each projection of the whole model; what attention and an FFN give is summed over its group. A group's first process
leads: it alone is a rank of the run, and the others take the very steps that it takes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import os
import sys
import threading
import time
import zlib
from array import array
from dataclasses import replace

import torch
import torch.distributed as dist

from sidp.batch import loading, run
from sidp.batch.engine import Ticket
from sidp.batch.paged import request_state
from sidp.batch.queue import Board
from sidp.batch.worker import serve
from sidp.errors import ConfigError, PeerError, SidpError
from sidp.hf import dummy
from sidp.launch import launch

_STUCK_S = 180.0  # without a step, or in one collective; loading takes members of a group about equally long
_END_S = 20.0  # for a process that failed, whose GPU may wait for the others' for ever
_TYPES = ("llama", "qwen2", "qwen3")
_BY_ROW = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # of the weight, [out, in]
_BY_COLUMN = ("o_proj", "down_proj")
_WHOLE = ("embed_tokens", "lm_head", "norm")


class Shard:
    """Part `index` of `parts` of a model, in place of the whole one; `group` sums over the processes that have the others."""

    def __init__(self, index: int, parts: int, group) -> None:
        self.index, self.parts, self.group = index, parts, group
        self._config, self._made_up, self._model = dummy.model_config, dummy.made_up, dummy.dummy_model
        dummy.model_config, dummy.made_up, dummy.dummy_model = self.config, self.made_up, self.model

    def config(self, source: str):
        """By its numbers the part is a model, so that the engine's KV cache is a part too."""
        config = copy.deepcopy(self._config(source))
        if config.model_type not in _TYPES:
            raise ConfigError(f"{source}: tensor parallelism knows {', '.join(_TYPES)}, not {config.model_type}")
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            number = getattr(config, name)
            if number % self.parts:
                raise ConfigError(f"{source}: --tp {self.parts} does not divide its {name}, {number}")
            setattr(config, name, number // self.parts)
        return config

    def made_up(self, name: str, shape: tuple[int, ...], *args) -> torch.Tensor:
        """The part's slice of the whole model's weight; `shape` is the slice's."""
        module, leaf = name.split(".")[-2:]
        if module in _BY_COLUMN and leaf == "bias":  # the sum is to have it once
            return self._made_up(name, shape, *args).mul_(self.index == 0)
        if module in _BY_ROW + _BY_COLUMN:
            axis = int(module in _BY_COLUMN)
            whole = tuple(size * self.parts if at == axis else size for at, size in enumerate(shape))
            part = self._made_up(name, whole, *args).chunk(self.parts, axis)[self.index]
            return part.clone(memory_format=torch.contiguous_format)  # the rest is freed
        if not module.endswith(_WHOLE):
            raise ConfigError(f"tensor parallelism does not know how to split {name}")
        return self._made_up(name, shape, *args)

    def model(self, *args):
        model = self._model(*args)
        for name, module in model.named_modules():
            if name.endswith(_BY_COLUMN):
                module.register_forward_hook(self._sum)
        return model

    def _sum(self, _module, _args, output: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(output, group=self.group)
        return output


class Lockstep:
    """Keeps the engines of a group at the same steps.

    At every turn of its loop transformers' engine asks its helper for tensor parallelism whether any process wants to end, and has
    it hand out the leader's new requests. Here the helper gets this group; the engine still takes its model for a whole one.
    Sizes of steps and of graphs follow from the steps before them. All compute the same tokens, since they have the same sums; a
    checksum of them goes with every turn.
    """

    def __init__(self, group, leader: int, leads: bool) -> None:
        from transformers.generation.continuous_batching import distributed, input_outputs

        self.group, self.leader, self.leads = group, leader, leads
        self.codec = None  # followers have it before their engines start
        self.last, self.ended_by_other = time.monotonic(), False
        self.output_tokens = self.preemptions = 0  # followers' requests count here instead of in an engine
        self._checksum = 0
        helper, ios = distributed.DistributedHelper, input_outputs.ContinuousBatchingIOs
        for name in ("tp_all_reduce_state", "tp_broadcast_object_from_rank_0", "infer_if_tp_driver"):
            if not hasattr(helper, name):
                raise ConfigError(f"this release of transformers has no {name}, which keeps engines in step")
        helper.tp_all_reduce_state = lambda _, *said, **named: self._exchange(*said, *named.values())
        helper.tp_broadcast_object_from_rank_0 = lambda _, payload: self._hand_out(payload)
        helper.infer_if_tp_driver = lambda _: self.leads
        self._take_tokens, ios.prepare_batch_update = ios.prepare_batch_update, lambda inputs: self._tokens(inputs)

    def _exchange(self, *said: int) -> tuple[int, ...]:
        """The largest of what all say: how much is handed out, how urgent the end is, and in newer engines whether to pause."""
        three = [*said, 0][:3]
        numbers = torch.tensor([*three, self._checksum, -self._checksum])
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        *answer, most, least = numbers.tolist()
        if most != -least:
            raise SidpError("the processes of a group have computed different tokens")
        self.last = time.monotonic()
        self.ended_by_other |= answer[1] > said[1]
        return tuple(answer[: len(said)])

    def _hand_out(self, payload: tuple[list, list]) -> tuple[list, list]:
        new, cancelled = payload
        tickets = [Ticket(int(s.request_id), s.sampling_request, s.initial_tokens, s.max_new_tokens) for s in new]
        told = [(tickets, cancelled)]
        dist.broadcast_object_list(told, self.leader, group=self.group, device=torch.device("cpu"))
        if self.leads:
            return payload
        tickets, cancelled = told[0]
        return [request_state(self, str(t.item), t, self.codec) for t in tickets], cancelled

    def _tokens(self, inputs):
        requests, tokens, *more = self._take_tokens(inputs)
        new = tokens[: sum(future.has_new_token for future in requests)]
        self._checksum = zlib.crc32(array("q", new).tobytes(), self._checksum)
        return requests, tokens, *more


def member(context, job, parts: int) -> None:
    """One process. Collective over all groups."""
    number, index = divmod(context.rank, parts)
    choose, kv_bytes = loading.choose_device, loading._kv_bytes
    device = choose(job.backend, context.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=_STUCK_S)
    for first in range(0, context.world_size, parts):  # all processes make all groups
        backends = ("gloo", "nccl" if device.type == "cuda" else "gloo")
        made = [dist.new_group(list(range(first, first + parts)), timeout, backend) for backend in backends]
        if first == number * parts:
            control, sums = made

    def agreed_kv_bytes(*args) -> int:
        least = torch.tensor(kv_bytes(*args))
        dist.all_reduce(least, dist.ReduceOp.MIN, group=control)
        return int(least)

    loading._kv_bytes = agreed_kv_bytes
    loading.choose_device = lambda backend, _rank: choose(backend, context.rank)
    Shard(index, parts, sums)
    lockstep = Lockstep(control, number * parts, index == 0)
    if job.batching == "auto":  # with which padded batches would stand in for an engine that fails
        job = replace(job, batching="continuous" if device.type == "cuda" else "grouped")
    if index > 0:
        return _follow(job, context.rank, number, f"{job.board}.{index}", lockstep)
    try:
        serve(replace(context, rank=number, world_size=context.world_size // parts), job)
    except SidpError as error:
        if lockstep.ended_by_other:
            raise PeerError(f"another process of group {number} failed") from error
        raise


def _follow(job, rank: int, number: int, path: str, lockstep: Lockstep) -> None:
    """To the leader's end. The board is the followers' own: by it they share their devices' memory as leaders do."""
    with contextlib.closing(Board(path)) as board:
        board.join(number)
        loaded = loading.load(job, rank)
        lockstep.codec = loaded.codec
        with contextlib.closing(loaded.make_engine(board)) as engine, _ends_in_time(rank):
            lockstep.last = time.monotonic()
            manager = engine._manager
            while manager.is_running() and manager.background_thread_status.fatal_error is None:
                if time.monotonic() - lockstep.last > _STUCK_S:
                    raise SidpError(f"group {number} has made no step for {_STUCK_S:g} s")
                time.sleep(0.05)
            if manager.background_thread_status.fatal_error is not None:
                engine._raise_if_ended()


@contextlib.contextmanager
def _ends_in_time(rank: int):
    try:
        yield
    except SidpError as error:
        print(f"error: process {rank}: {error}", file=sys.stderr, flush=True)
        end = threading.Timer(_END_S, os._exit, (1,))
        end.daemon = True
        end.start()
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tp", type=int, required=True, metavar="T", help="GPUs of a group")
    parser.add_argument("--dp", type=int, required=True, metavar="N", help="GPUs in all; other words are run-batch's")
    args, words = parser.parse_known_args()
    if args.tp < 1 or args.dp < 1 or args.dp % args.tp:
        parser.error(f"--dp {args.dp} GPUs are no groups of --tp {args.tp}")
    if "--no-pool" not in words or "dummy" not in words or "padded" in words or "RANK" in os.environ:
        parser.error("only for --no-pool --load-format dummy, neither with --batching padded nor under torchrun")

    def launch_groups(_serve, groups: int, job: tuple, survivors: bool) -> list:
        """As run-batch starts its ranks, but the end of one process is the end of all."""
        for index in range(1, args.tp):
            Board.create(f"{job[0].board}.{index}", groups, [])
        return launch(member, groups * args.tp, (*job, args.tp))

    run.launch = launch_groups
    # Buffers of captured sums cannot be registered in expandable segments, nor where another process does not capture; and
    # steps with prompts are launched while captured ones run.
    os.environ.update({"NCCL_GRAPH_REGISTER": "0", "NCCL_GRAPH_MIXING_SUPPORT": "1"})
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # as serve has it, for followers too
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from sidp.cli import main as command

    sys.exit(command(["run-batch", "--dp", str(args.dp // args.tp), *words]))


if __name__ == "__main__":
    main()
