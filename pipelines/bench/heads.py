"""Benches of the classifier's step and of AttFC's: streamed formulations against the usual ones.

Legend: B batch, D embedding, N identities, S slots of a queue, T classes of one tile.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

from fr_core.config import Config
from fr_core.config.methods import AnyMargin, BigFace, Margin
from fr_core.config.reference import held_sections, kind_of
from fr_core.device import multiplies_bfloat16, peak_memory, use_processor
from fr_core.errors import UserError
from fr_core.heads.class_queue import ClassQueue
from fr_core.heads.sharded_fc import ShardedFC, initial_rows
from fr_core.heads.streamed import Softmax, tile_size
from fr_core.optim.optimizers import RowSGD, head_optimizer
from fr_core.ranks import Ranks
from pipelines.bench.turns import CPU, Turn, answer, child, ratio

ARCFACE = Margin(scale=64, m2=0.5, m3=0)
MILLION = 1_029_950  # identities of WebFace21M in table 2 of AttFC (arXiv 2025)
MILLION_BATCH = 64
WARM_ROWS = 64  # rows of a first step that loads libraries and starts threads before memory is counted


@dataclass(frozen=True)
class Head:
    """One formulation of the classifier's step, and the size of its problem."""

    formulation: str  # plain, fused or products
    precision: str
    identities: int
    batch: int
    embedding: int
    threads: int
    margin: AnyMargin = ARCFACE

    @property
    def state_bytes(self) -> int:
        """Return the bytes of weights and momentum."""
        return 2 * 4 * self.identities * self.embedding


def bench_head(
    identities: int,
    batch: int,
    embedding: int,
    repeats: int,
    threads: int,
    million: bool,
    emulated: bool,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Measure an ArcFace and SGD step over N identities: fused, plain, and its matrix products alone.

    Args:
        repeats: timed steps; figures are their medians.
        threads: threads of each process.
        million: measure a million identities too.
        emulated: measure bfloat16 also where the processor emulates it.
        say: function that shows a line of progress.

    Returns:
        Figures; P is a precision of this processor, float32 or bf16:

        - ``time_ratio_P``: fused over plain.
        - ``time_over_products_P``: fused over the matrix products alone.
        - ``peak_over_state`` and ``reference_peak_over_state``: growth of peak memory by weights and momentum.
        - ``seconds_FORMULATION_P``: seconds of a step.
        - ``seconds_nN`` and ``mib_above_state_nN``: seconds, and MiB above weights and momentum, for four N.
        - ``million_seconds`` and ``million_rss_gib``: for a million identities.

    Raises:
        RuntimeError: the formulations' losses differ.
    """
    figures: dict[str, float] = {"identities": identities, "batch": batch, "embedding": embedding, "threads": threads}
    shape = (identities, batch, embedding, threads)
    precisions = ["float32"]
    if emulated or multiplies_bfloat16(CPU):
        precisions.append("bfloat16")
    else:
        say("bfloat16 is left out: this processor emulates it, in minutes a step; --emulated measures it all the same")
    for precision in precisions:
        heads = [Head(name, precision, *shape) for name in ("plain", "fused", "products")]
        seconds, losses, peaks = _measured(heads, repeats, say)
        allowed = 1e-3 if precision == "float32" else 0.02
        if abs(losses[0] - losses[1]) > allowed * losses[0]:
            raise RuntimeError(f"losses differ in {precision}: plain {losses[0]}, fused {losses[1]}")
        short = "bf16" if precision == "bfloat16" else precision
        plain, fused, products = seconds
        figures |= {
            f"seconds_{h.formulation}_{short}": statistics.median(s) for h, s in zip(heads, seconds, strict=True)
        }
        figures[f"time_ratio_{short}"] = ratio(fused, plain)
        figures[f"time_over_products_{short}"] = ratio(fused, products)
        if precision == "float32":
            figures["peak_over_state"] = peaks[1] / heads[1].state_bytes
            figures["reference_peak_over_state"] = peaks[0] / heads[0].state_bytes
    sizes = [Head("fused", "float32", identities * part // 4, batch, embedding, threads) for part in (1, 2, 3, 4)]
    for head in sizes:
        (times,), _, (peak,) = _measured([head], repeats, say)
        figures[f"seconds_n{head.identities}"] = statistics.median(times)
        figures[f"mib_above_state_n{head.identities}"] = (peak - head.state_bytes) / 2**20
    if million:
        head = Head("fused", "float32", MILLION, MILLION_BATCH, embedding, threads)
        with child(_serve, head, head.identities) as turn:
            turn("step")
            figures["million_seconds"] = turn("step")[0]
            figures["million_rss_gib"] = turn("peak")[0] / 2**30
    return figures


def bench_margin(
    kind: str,
    identities: int,
    batch: int,
    embedding: int,
    repeats: int,
    threads: int,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Measure a fused step with a margin against ArcFace's, in float32 and in turns.

    Args:
        kind: kind of the margin, at its defaults.
        repeats: timed steps; figures are their medians.
        threads: threads of each process.
        say: function that shows a line of progress.

    Returns:
        Figures:

        - ``time_ratio``: the margin's seconds over ArcFace's.
        - ``peak_ratio``: growth of peak memory, over ArcFace's; weights and momentum are part of both.
        - ``seconds_arcface`` and ``seconds_KIND``: seconds of a step.
        - ``mib_above_state_arcface`` and ``mib_above_state_KIND``: MiB above weights and momentum.

    Raises:
        UserError: there is no such margin.
    """
    kinds = [str(kind_of(section)) for section in held_sections(BigFace.model_fields["margin"].annotation)]
    if kind not in kinds:
        raise UserError(f"--margin {kind}: no such margin; use {', '.join(kinds)}")
    margin = BigFace.model_validate({"margin": {"kind": kind}}).margin
    shape = (identities, batch, embedding, threads)
    heads = [Head("fused", "float32", *shape), Head("fused", "float32", *shape, margin=margin)]
    (arcface, ours), _, peaks = _measured(heads, repeats, say)
    figures: dict[str, float] = {"identities": identities, "batch": batch, "embedding": embedding, "threads": threads}
    figures |= {"time_ratio": ratio(ours, arcface), "peak_ratio": peaks[1] / peaks[0]}
    for name, seconds, head, peak in zip(("arcface", kind), (arcface, ours), heads, peaks, strict=True):
        figures[f"seconds_{name}"] = statistics.median(seconds)
        figures[f"mib_above_state_{name}"] = (peak - head.state_bytes) / 2**20
    return figures


@dataclass(frozen=True)
class Queue:
    """One formulation of AttFC's loss and queue, and the size of its problem."""

    formulation: str  # plain or streamed
    precision: str
    slots: int
    batch: int
    embedding: int
    threads: int

    @property
    def state_bytes(self) -> int:
        """Return the bytes of the queue."""
        return (2 if self.precision == "bfloat16" else 4) * self.slots * self.embedding


def bench_attfc(
    slots: int,
    batch: int,
    embedding: int,
    identities: int,
    repeats: int,
    threads: int,
    emulated: bool,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Measure a step of AttFC's head on random features in the reference order: streamed against usual.

    The usual formulation clones the queue, compares all labels with all slots and concatenates the logits.
    Autograd does the rest.

    Args:
        slots: slots of the queue.
        identities: number of different labels.
        repeats: timed steps; figures are their medians.
        threads: threads of each process.
        emulated: measure bfloat16 also where the processor emulates it.
        say: function that shows a line of progress.

    Returns:
        Figures; P is a precision of this processor, float32 or bf16:

        - ``head_time_ratio_P``: streamed over usual.
        - ``head_memory_ratio``: growth of peak memory in float32, streamed over usual.
        - ``seconds_FORMULATION_P``: seconds of a step.
        - ``seconds_nN``: seconds of the streamed form for N identities, and for ten times as many.

    Raises:
        RuntimeError: the formulations' losses differ.
    """
    figures: dict[str, float] = {"slots": slots, "batch": batch, "embedding": embedding, "threads": threads}
    precisions = ["float32"]
    if emulated or multiplies_bfloat16(CPU):
        precisions.append("bfloat16")
    else:
        say("bfloat16 is left out: this processor emulates it, in minutes a step; --emulated measures it all the same")
    for precision in precisions:
        queues = [Queue(name, precision, slots, batch, embedding, threads) for name in ("plain", "streamed")]
        with _children([(queue, identities) for queue in queues]) as turns:
            losses = [turn("step")[1] for turn in turns]
            seconds: list[list[float]] = [[] for _ in queues]
            for repeat in range(repeats):
                for queue, turn, times in zip(queues, turns, seconds, strict=True):
                    times.append(turn("step")[0])
                    say(f"{queue.formulation} {precision} S={slots:,} {repeat + 1}: {times[-1]:.3f} s")
            growth = [peak - base for peak, base in (turn("peak") for turn in turns)]
        if abs(losses[0] - losses[1]) > (1e-3 if precision == "float32" else 0.02) * losses[0]:
            raise RuntimeError(f"losses differ in {precision}: plain {losses[0]}, streamed {losses[1]}")
        short = "bf16" if precision == "bfloat16" else precision
        figures |= {
            f"seconds_{q.formulation}_{short}": statistics.median(s) for q, s in zip(queues, seconds, strict=True)
        }
        figures[f"head_time_ratio_{short}"] = ratio(seconds[1], seconds[0])
        if precision == "float32":
            figures |= {f"gib_{q.formulation}": g / 2**30 for q, g in zip(queues, growth, strict=True)}
            figures["head_memory_ratio"] = growth[1] / growth[0]
    for count in (identities, 10 * identities):
        with child(_serve, Queue("streamed", "float32", slots, batch, embedding, threads), count) as turn:
            turn("step")
            figures[f"seconds_n{count}"] = statistics.median(turn("step")[0] for _ in range(repeats))
    return figures


def _measured(
    heads: list[Head], repeats: int, say: Callable[[str], None]
) -> tuple[list[list[float]], list[float], list[float]]:
    """Let the heads take turns; return seconds of every turn, first losses and growth of peak memory in bytes."""
    with _children([(head, head.identities) for head in heads]) as turns:
        first = [turn("step")[1] for turn in turns]  # not timed: it touches the pages of weights and momentum
        seconds: list[list[float]] = [[] for _ in heads]
        for repeat in range(repeats):
            for head, turn, times in zip(heads, turns, seconds, strict=True):
                times.append(turn("step")[0])
                what = f"{head.formulation} {head.margin.kind} {head.precision}"
                say(f"{what} N={head.identities:,} {repeat + 1}: {times[-1]:.3f} s")
        growth = [peak - base for peak, base in (turn("peak") for turn in turns)]
    return seconds, first, growth


@contextmanager
def _children(problems: Sequence[tuple[Head | Queue, int]]) -> Iterator[list[Turn]]:
    if not problems:
        yield []
        return
    with child(_serve, *problems[0]) as turn, _children(problems[1:]) as rest:
        yield [turn, *rest]


def _serve(questions: Connection, problem: Head | Queue, identities: int) -> None:
    if problem.formulation == "plain":  # stock PyTorch with its stock allocator
        torch.set_num_threads(problem.threads)
    else:
        use_processor(problem.threads)
    small = replace(problem, slots=max(WARM_ROWS, problem.batch)) if isinstance(problem, Queue) else problem
    _stepper(small, WARM_ROWS)()
    base = peak_memory(CPU)
    answer(questions, _stepper(problem, identities), base)


def _stepper(problem: Head | Queue, identities: int) -> Callable[[], float]:
    match problem:
        case Head():
            return _head_stepper(problem, identities)
        case Queue():
            return _queue_stepper(problem, identities)
        case _ as unknown:
            assert_never(unknown)


def _head_stepper(head: Head, identities: int) -> Callable[[], float]:
    random = torch.Generator().manual_seed(0)
    x_BD = torch.randn(head.batch, head.embedding, generator=random)
    labels_B = torch.randint(0, identities, (head.batch,), generator=random)
    if head.formulation == "fused":
        return _fused(x_BD, labels_B, identities, head.precision, head.margin)
    steppers = {"plain": _plain, "products": _products}
    return steppers[head.formulation](x_BD, labels_B, identities, head.precision)


def _plain(x_BD: Tensor, labels_B: Tensor, identities: int, precision: str) -> Callable[[], float]:
    """Return a step of the reference, the usual code in stock PyTorch."""
    weight = initial_rows(0, identities, x_BD.shape[1], seed=0).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=True)
    faces = torch.arange(len(x_BD))

    def step() -> float:
        x = x_BD.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            cos = F.linear(F.normalize(x), F.normalize(weight))
        cos = cos.float().clamp(-1, 1)
        target = torch.cos(torch.acos(cos[faces, labels_B]) + ARCFACE.m2)
        loss = F.cross_entropy(ARCFACE.scale * cos.index_put((faces, labels_B), target), labels_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _fused(x_BD: Tensor, labels_B: Tensor, identities: int, precision: str, margin: AnyMargin) -> Callable[[], float]:
    method = BigFace.model_validate({"margin": margin, "update": "fused", "precision": precision})
    head = ShardedFC(identities, x_BD.shape[1], method, Ranks(), seed=0)
    optimizer = head_optimizer(Config(method=method), method, head)
    assert isinstance(optimizer, RowSGD)

    def step() -> float:
        (drawn_B,) = head.draw(0, len(x_BD), 1, x_BD.device)
        loss = head(x_BD.clone().requires_grad_(), labels_B, sgd=optimizer.tile_sgd(), drawn_G=drawn_B)
        loss.backward()
        return float(loss.detach())

    return step


def _products(x_BD: Tensor, labels_B: Tensor, identities: int, precision: str) -> Callable[[], float]:
    """Return a step of the streamed form's four matrix products alone, on operands that are ready."""
    dtype = getattr(torch, precision)
    weight_ND, x_BD = initial_rows(0, identities, x_BD.shape[1], seed=0).to(dtype), x_BD.to(dtype)
    if not multiplies_bfloat16(x_BD.device):
        weight_ND, x_BD = weight_ND.float(), x_BD.float()
    size = tile_size(len(x_BD), x_BD.shape[1], x_BD.device)

    def step() -> float:
        total_BD = torch.zeros_like(x_BD)
        for weight_TD in weight_ND.split(size):
            torch.mm(x_BD, weight_TD.T)
        for weight_TD in weight_ND.split(size):
            cos_BT = torch.mm(x_BD, weight_TD.T)
            total_BD.addmm_(cos_BT, weight_TD)
            torch.mm(cos_BT.T, x_BD)
        return 0.0

    return step


def _queue_stepper(problem: Queue, identities: int) -> Callable[[], float]:
    random = torch.Generator().manual_seed(0)
    x_BD = torch.randn(problem.batch, problem.embedding, generator=random)
    centres_BD = F.normalize(x_BD + torch.randn(x_BD.shape, generator=random))
    labels_B = torch.randint(0, identities, (problem.batch,), generator=random)
    softmax = Softmax(ARCFACE, precision=getattr(torch, problem.precision))
    queue = ClassQueue(problem.slots, problem.embedding, softmax, seed=0)
    queue.labels_S.copy_(torch.randint(0, identities, queue.labels_S.shape, generator=random))
    if problem.formulation == "plain":
        return _plain_queue(x_BD, centres_BD, labels_B, queue)

    def step() -> float:
        loss = queue(x_BD.clone().requires_grad_(), centres_BD, labels_B)
        loss.backward()
        queue.put(centres_BD, labels_B, 0)
        return float(loss.detach())

    return step


def _plain_queue(x_BD: Tensor, centres_BD: Tensor, labels_B: Tensor, queue: ClassQueue) -> Callable[[], float]:
    """Return a step of the reference, the usual formulation."""
    centres_SD, labels_S = queue.centres_SD, queue.labels_S
    zeros = torch.zeros(len(x_BD), dtype=torch.int64)

    def step() -> float:
        unit = F.normalize(x_BD.clone().requires_grad_()).to(centres_SD.dtype)
        own = (unit * centres_BD.to(unit.dtype)).sum(1, keepdim=True)
        others = unit @ centres_SD.clone().detach().T
        others = others.masked_fill(labels_B[:, None] == labels_S[None], -torch.inf)
        own = torch.cos(torch.acos(own.float().clamp(-1, 1)) + ARCFACE.m2)
        logits = ARCFACE.scale * torch.cat([own, others.float().clamp(max=1)], 1)
        loss = F.cross_entropy(logits, zeros)
        loss.backward()
        centres_SD[: len(x_BD)] = centres_BD
        labels_S[: len(x_BD)] = labels_B
        return float(loss.detach())

    return step
