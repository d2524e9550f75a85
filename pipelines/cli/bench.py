"""``bigface bench``."""

from pathlib import Path
from typing import Annotated

import typer

from fr_core.data.store import explain_disk_errors
from fr_core.errors import UserError
from pipelines.cli.app import app
from pipelines.cli.options import Json, NetName, local
from pipelines.cli.output import console, show, show_table

bench = typer.Typer(no_args_is_help=True, help="Speed and memory against plain references, in one run.")
app.add_typer(bench, name="bench", rich_help_panel="Measuring")


@bench.command("head")
def bench_head(
    identities: Annotated[int, typer.Option(min=1000)] = 200_000,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    embedding: Annotated[int, typer.Option(min=2)] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; figures are their medians.")] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    million: Annotated[bool, typer.Option(help="Also a million identities in one process.")] = True,
    emulated: Annotated[bool, typer.Option("--emulated", help="bfloat16 also where it is not native.")] = False,
    json: Json = None,
) -> None:
    """The classifier's step: streamed and fused, against plain PyTorch and against its matrix products alone."""
    from pipelines.bench.heads import bench_head as run

    show("bench head", run(identities, batch, embedding, repeats, threads, million, emulated, console.log), json)


@bench.command("attfc")
def bench_attfc(
    slots: Annotated[int, typer.Option(min=1000)] = 300_000,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    embedding: Annotated[int, typer.Option(min=2)] = 512,
    identities: Annotated[int, typer.Option(min=1)] = 1_000_000,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; figures are their medians.")] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    emulated: Annotated[bool, typer.Option("--emulated", help="bfloat16 also where it is not native.")] = False,
    flat: Annotated[str | None, typer.Option(help="Flat shards, to measure the data path too.")] = None,
    grouped: Annotated[str | None, typer.Option(help="The same images as grouped shards.")] = None,
    json: Json = None,
) -> None:
    """AttFC's loss and queue: streamed, against the usual formulation; and class images from grouped shards."""
    from pipelines.bench.data import bench_grouped
    from pipelines.bench.heads import bench_attfc as run

    figures = run(slots, batch, embedding, identities, repeats, threads, emulated, console.log)
    if (flat is None) != (grouped is None):
        raise UserError("the data path needs both --flat and --grouped")
    if flat and grouped:
        figures |= bench_grouped(flat, grouped, 4)
    show("bench attfc", figures, json)


@bench.command("memory")
def bench_memory(
    depth: Annotated[int, typer.Option(help="Of an IR-ResNet.")] = 100,
    width: Annotated[int, typer.Option(min=8)] = 16,
    size: Annotated[int, typer.Option(min=32, help="Side of the images, pixels.")] = 64,
    batch: Annotated[int, typer.Option(min=8, help="Global; a multiple of 4.")] = 32,
    identities: Annotated[int, typer.Option(min=1000)] = 50_000,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; figures are their medians.")] = 2,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    json: Json = None,
) -> None:
    """A training step's peak memory and time under each switch that trades one for the other."""
    from pipelines.bench.memory import bench_memory as run

    rows, figures = run(depth, width, size, batch, identities, repeats, threads, console.log)
    show_table(rows, "Memory above the bare process, of rank 0")
    show("bench memory", figures, json)


@bench.command("ingest")
def bench_ingest(
    images: Annotated[int, typer.Option(min=1000)] = 200_000,
    folder: Annotated[Path, typer.Option(parser=local, help="Scratch for archives and shards.")] = Path("bench_ingest"),
    json: Json = None,
) -> None:
    """Tar and RecordIO to shards: images a second, and memory on a tenth of the images and on all."""
    from pipelines.bench.data import bench_ingest as run

    with explain_disk_errors(folder):
        show("bench ingest", run(images, folder, console.log), json)


@bench.command("masks")
def bench_masks(
    images: Annotated[int, typer.Option(min=100, help="A turn; figures are medians of three.")] = 3000,
    json: Json = None,
) -> None:
    """Masks a second on one core, by both tools, against a plain 2D one."""
    from pipelines.bench.data import bench_masks as run

    show("bench masks", run(images), json)


@bench.command("schedule")
def bench_schedule(
    steps: Annotated[int, typer.Option(min=1000)] = 200_000,
    json: Json = None,
) -> None:
    """FastFace's time per step, against a window that is summed anew each step."""
    from pipelines.bench.schedule import bench_schedule as run

    show("bench schedule", run(steps), json)


@bench.command("latency")
def bench_latency(
    model: Annotated[str | None, typer.Option(help="One net instead of all depths: as for verify.")] = None,
    net: NetName = None,
    budget_ms: Annotated[float, typer.Option(min=0, help="For an answer: FRUITS-1000's.")] = 1000.0,
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns; figures are their medians.")] = 7,
    json: Json = None,
) -> None:
    """One face on one core: nets as they train, with batch norm folded, and in ONNX Runtime; which fit a budget."""
    from pipelines.bench.latency import bench_latency as run
    from pipelines.bench.latency import table

    rows, figures = run(model, net, budget_ms, repeats, console.log)
    show_table(table(rows), "one thread, one image; an answer is decoding, alignment and the fastest form")
    show("bench latency", figures, json, rows=rows)


@bench.command("quant")
def bench_quant(
    model: Annotated[str | None, typer.Option(help="One float net instead of MobileFaceNet and R18.")] = None,
    net: NetName = None,
    weights: Annotated[int, typer.Option(min=2, max=8, help="Bits.")] = 8,
    activations: Annotated[int, typer.Option(min=2, max=8, help="Bits.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns; figures are their medians.")] = 15,
    json: Json = None,
) -> None:
    """One face on one core in ONNX Runtime: nets in integers against float32, by time and file size."""
    from pipelines.bench.quant import bench_quant as run
    from pipelines.bench.quant import table

    rows, figures, processor = run(model, net, weights, activations, repeats, console.log)
    told = ", ".join(f"{name} {value}" for name, value in processor.items())
    show_table(table(rows), f"one thread, one image; plain: PReLU as PyTorch exports it; {told}")
    show("bench quant", figures, json, rows=rows, processor=processor)


@bench.command("recovery")
def bench_recovery(
    steps: Annotated[int, typer.Option(min=40, help="Of each of three runs.")] = 200,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 20,
    json: Json = None,
) -> None:
    """A killed worker and a killed node of two, on this machine: seconds to the next step, and what was lost."""
    from pipelines.bench.recovery import bench_recovery as run

    table, figures = run(steps, save_every, console.log)
    show_table(table, "bench recovery")
    show("bench recovery", figures, json)
