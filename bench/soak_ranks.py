"""What each rank of the soak does (soak.py): pools of random settings, used at random, every result checked."""

from __future__ import annotations

import contextlib
import os
import random
import time
from pathlib import Path

import torch

from sidp import FFNSpec, PeerError, PoolConfig, SidpError, WeightPool, ffn_forward
from sidp.ffn import apply_formula

LAYERS, HIDDEN, INNER = 8, 64, 192
_TIMEOUT_S = 20.0
ROUND_S = 2.5
_ROWS = (1, 1, 2, 5, 17, 64)
_MODES = ("was", "cas", "auto")
_TOLD_WITHIN_S = 2.0  # that a rank died, after a CUDA error that is its consequence


def spec_of(device: str) -> FFNSpec:
    return FFNSpec(HIDDEN, INNER, dtype=torch.bfloat16 if device == "cuda" else torch.float32)


def weights(spec: FFNSpec, layer: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    return {t.name: (torch.randn(t.shape, generator=generator) / 8).to(t.dtype) for t in spec.unit().tensors}


def used() -> dict[str, float]:
    status = Path("/proc/self/statm").read_text().split()
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "rss_mib": int(status[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }


def draw(chance: random.Random, device: str, early: bool) -> dict:
    """One round's settings, the same on all ranks but for the mode. ``early``: CaS is to be used in it, so that it is loaded."""
    on_gpu = device == "cuda"
    redundancy = chance.choice((0, 1))
    # With backups there is no CaS on GPUs, and no memory that goes with its process.
    if on_gpu and (early or os.environ.get("SIDP_P2P") == "ipc"):
        redundancy = 0
    return {
        "placement": chance.choice(("layer", "striped")),
        "slots": chance.choice((1, 2, 3)),
        "redundancy": redundancy,
        "backup": chance.choice(("peer", "host") if on_gpu else ("peer", "host", "file")),
        "peak_shifting": chance.random() < 0.7,
        "resident_layers": chance.choice((0, 0, 1)),
        "force_fetch": on_gpu,  # several ranks on one GPU would read each other's layers in place
    }


def check(y, x, tensors, spec, mode: str) -> None:
    """WaS and local to the bit; CaS within the rounding of the dtype."""
    expected = apply_formula(x, tensors, spec)
    if mode == "cas":
        limit = 2e-2 if spec.dtype is torch.bfloat16 else 1e-4
        difference = (y.double() - expected.double()).abs().max() / expected.double().abs().max()
        if not difference < limit:
            raise AssertionError(f"a result of CaS is off by {difference:.2e} of the largest value")
    elif not torch.equal(y, expected):
        raise AssertionError(f"a result of {mode} is not the reference's")


def forwards(pool, chance: random.Random, generator, reference, spec, device: str) -> int:
    """One forward of random batch sizes, or the same one several times over in the same buffers, as a graph is replayed."""
    order = list(range(LAYERS))
    if chance.random() < 0.1:
        chance.shuffle(order)
    batches = [(layer, torch.empty(chance.choice(_ROWS), HIDDEN, dtype=spec.dtype)) for layer in order]
    batches = [(layer, x.to(device)) for layer, x in batches]
    replays = chance.choice((1, 1, 1, 5))
    for _ in range(replays):
        for layer, x in batches:
            x.copy_(torch.randn(x.shape, generator=generator))
            y = ffn_forward(x, pool, layer)
            if device == "cuda":  # calls return before their work is done; what went wrong in it is said first
                torch.cuda.synchronize()
                pool.check()
            check(y, x, reference[layer], spec, pool.stats().last_mode)
    return replays * LAYERS


def load_kernels(spec: FFNSpec, device: torch.device) -> None:
    """CUDA loads a kernel at its first use, tens of MB at times, which would look like a leak in whichever round that is."""
    tensors = {name: tensor.to(device) for name, tensor in weights(spec, 0, 0).items()}
    for rows in _ROWS:
        x = torch.ones(rows, HIDDEN, dtype=spec.dtype, device=device)
        check(apply_formula(x, tensors, spec), x, tensors, spec, "cas")


def who_took_the_context(pool, error: Exception) -> int:
    """Under MPS a killed process may take the CUDA contexts of others with it: the rank that died; raises ``error`` if none did."""
    end = time.monotonic() + _TOLD_WITHIN_S
    while time.monotonic() < end:
        try:
            pool.check()
            if (lost := pool.stats().lost_rank) >= 0:
                return lost
        except PeerError as loss:
            return loss.rank
        except SidpError:
            pass
        time.sleep(0.02)
    raise error


def body(ctx, seed: int, device: str, end: float) -> dict:
    """Rounds until `end` (time.time) or a loss; what was seen."""
    shared, own = random.Random(seed), random.Random(seed * 31 + ctx.rank)
    spec, done, ready = spec_of(device), 0, []
    torch_device = torch.device(device)
    rounds = 0

    def counted() -> dict:
        return {"calls": done, "rounds": rounds, "use": ready}

    if device == "cuda":
        load_kernels(spec, torch_device)
    while True:
        round_end = time.time() + ROUND_S
        early = rounds < len(_MODES)  # each mode once before what is in use is first looked at
        settings = draw(shared, device, early)
        mode = own.choice(_MODES) if shared.random() < 0.7 else "was"
        if early:
            mode = _MODES[(rounds + ctx.rank) % len(_MODES)]
        if device == "cuda" and settings["redundancy"] and mode == "cas":
            mode = "was"  # survival on GPUs is offered in WaS
        generator = torch.Generator().manual_seed(own.randrange(1 << 30))
        config = PoolConfig(mode=mode, device=device, timeout_s=_TIMEOUT_S, **settings)
        version = shared.randrange(1 << 20)
        reference = [weights(spec, layer, version) for layer in range(LAYERS)]
        pool = WeightPool([spec] * LAYERS, config=config)
        for layer in range(LAYERS):
            pool.load(layer, reference[layer])
        pool.backup_from(lambda layer, name, index, reference=reference: reference[layer][name][index])
        pool.commit()
        reference = [{name: tensor.to(torch_device) for name, tensor in layer.items()} for layer in reference]
        after, went_on = 0, None
        ctx.say(f"round {rounds}", settings)
        try:
            while time.time() < round_end or (pool.stats().lost_rank >= 0 and after < 3):
                done += forwards(pool, own, generator, reference, spec, device)
                if pool.stats().lost_rank >= 0:
                    after += 1
                    if after == 1:
                        went_on = time.time()
                if own.random() < 0.05:
                    time.sleep(own.random() * 0.2)
        except (SidpError, RuntimeError) as error:  # torch's CUDA errors are RuntimeErrors
            seen, context = time.time(), not isinstance(error, PeerError)
            lost = who_took_the_context(pool, error) if context else error.rank
            again = (SidpError, RuntimeError) if context else (PeerError,)  # on GPUs it tells of the same loss again
            with contextlib.suppress(*again):
                pool.close()
            return {**counted(), "lost": lost, "seen": seen, "context": context}
        stats = pool.stats()
        pool.close()
        del reference
        if stats.lost_rank >= 0:
            return {**counted(), "lost": stats.lost_rank, "seen": None, "went_on": went_on}
        rounds += 1
        time.sleep(0.15)  # the store's thread ends by itself
        ready.append(used())
        ctx.say(f"ended {rounds}")
        if ctx.rank == 0:  # one clock decides for all whether this was the last round
            ctx.say(f"goes on {rounds}", time.time() < end)
        if not ctx.hear(f"round {rounds}", timeout=60):
            return {**counted(), "lost": -1, "seen": None}
