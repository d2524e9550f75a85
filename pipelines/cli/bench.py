"""``bigface bench``."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from fr_core.data.store import explain_disk_errors
from fr_core.errors import UserError
from pipelines.cli.app import app
from pipelines.cli.options import Json, NetName, TrustCode, local
from pipelines.cli.output import console, show, show_line, show_table, write_json

bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory against plain references in one run.")
app.add_typer(bench, name="bench", rich_help_panel="Measuring")


@bench.command("head")
def bench_head(
    identities: Annotated[int, typer.Option(min=1000, help="Identities of the class matrix.")] = 200_000,
    batch: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 128,
    embedding: Annotated[int, typer.Option(min=2, help="Dimensions of an embedding.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; figures are their medians.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
    million: Annotated[bool, typer.Option(help="Measure a million identities too, in one process.")] = True,
    emulated: Annotated[bool, typer.Option("--emulated", help="bfloat16 also where it is not native.")] = False,
    margin: Annotated[
        str | None, typer.Option(help="Measure this margin's fused step against ArcFace's instead: adaface, magface …")
    ] = None,
    json: Json = None,
) -> None:
    """Measure the classifier's fused step against plain PyTorch and against its matrix products alone."""
    from pipelines.bench.heads import bench_head as run
    from pipelines.bench.heads import bench_margin

    shape = (identities, batch, embedding, repeats, threads)
    figures = bench_margin(margin, *shape, console.log) if margin else run(*shape, million, emulated, console.log)
    show("bench head", figures, json)


@bench.command("attfc")
def bench_attfc(
    slots: Annotated[int, typer.Option(min=1000, help="Class centres in the queue.")] = 300_000,
    batch: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 128,
    embedding: Annotated[int, typer.Option(min=2, help="Dimensions of an embedding.")] = 512,
    identities: Annotated[int, typer.Option(min=1, help="Identities that the labels are drawn from.")] = 1_000_000,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; figures are their medians.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
    emulated: Annotated[bool, typer.Option("--emulated", help="bfloat16 also where it is not native.")] = False,
    flat: Annotated[
        str | None, typer.Option(help="Flat shards, to measure the data path too; needs --grouped.")
    ] = None,
    grouped: Annotated[str | None, typer.Option(help="Grouped shards of the same images; needs --flat.")] = None,
    json: Json = None,
) -> None:
    """Measure AttFC's streamed loss and queue against the usual formulation, and class images from grouped shards."""
    from pipelines.bench.data import bench_grouped
    from pipelines.bench.heads import bench_attfc as run

    figures = run(slots, batch, embedding, identities, repeats, threads, emulated, console.log)
    if (flat is None) != (grouped is None):
        raise UserError("the data path needs both layouts: give --flat DIR and --grouped DIR")
    if flat and grouped:
        figures |= bench_grouped(flat, grouped, 4)
    show("bench attfc", figures, json)


@bench.command("memory")
def bench_memory(
    depth: Annotated[int, typer.Option(help="Depth of the IR-ResNet.")] = 100,
    width: Annotated[int, typer.Option(min=8, help="Channels of the first stage.")] = 16,
    size: Annotated[int, typer.Option(min=32, help="Side of the images, pixels.")] = 64,
    batch: Annotated[int, typer.Option(min=8, help="Global batch, a multiple of 4.")] = 32,
    identities: Annotated[int, typer.Option(min=1000, help="Identities of the class matrix.")] = 50_000,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; figures are their medians.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
    json: Json = None,
) -> None:
    """Measure a training step's peak memory and time under each switch that trades one for the other."""
    from pipelines.bench.memory import bench_memory as run

    rows, figures = run(depth, width, size, batch, identities, repeats, threads, console.log)
    show_table(rows, "Rank 0's memory above the bare process")
    write_json("bench memory", figures, json)


@bench.command("checkpoint")
def bench_checkpoint(
    identities: Annotated[int, typer.Option(min=1000, help="Identities of the class matrix.")] = 250_000,
    folder: Annotated[Path, typer.Option(parser=local, help="Scratch folder for the checkpoints.")] = Path(
        "bench_checkpoint"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Checkpoints of each way; figures are their medians.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
    json: Json = None,
) -> None:
    """Measure how long a checkpoint keeps the training waiting, written beside it and not."""
    from pipelines.bench.checkpoint import bench_checkpoint as run

    with explain_disk_errors(folder):
        show("bench checkpoint", run(identities, folder, repeats, threads, console.log), json)


@bench.command("data")
def bench_data(
    flat: Annotated[str | None, typer.Option(help="Flat shards instead of drawn faces; needs --grouped.")] = None,
    grouped: Annotated[str | None, typer.Option(help="Grouped shards of the same images; needs --flat.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 128,
    images: Annotated[int, typer.Option(min=1, help="Images of each turn.")] = 8000,
    repeats: Annotated[int, typer.Option(min=1, help="Turns; figures are their medians.")] = 5,
    json: Json = None,
) -> None:
    """Measure images a second that a step gets, against bare decoding and a DataLoader over an image folder."""
    from pipelines.bench.stream import bench_data as run
    from pipelines.bench.stream import draw_shards, table

    if (flat is None) != (grouped is None):
        raise UserError("the data path needs both layouts: give --flat DIR and --grouped DIR, or neither")
    with TemporaryDirectory(prefix="bigface-") as scratch:
        if flat is None or grouped is None:
            flat, grouped = draw_shards(Path(scratch), console.log)
        rows, figures = run(flat, grouped, Path(scratch) / "folders", batch, images, repeats, console.log)
    show_table(table(rows), f"{figures['cores']} cores, batch {batch}, no net")
    write_json("bench data", figures, json)


@bench.command("ingest")
def bench_ingest(
    images: Annotated[int, typer.Option(min=1000, help="Images to pack and ingest.")] = 200_000,
    folder: Annotated[Path, typer.Option(parser=local, help="Scratch folder for archives and shards.")] = Path(
        "bench_ingest"
    ),
    json: Json = None,
) -> None:
    """Measure the ingest of tar and RecordIO files: images a second, and memory for a tenth and for all images."""
    from pipelines.bench.data import bench_ingest as run

    with explain_disk_errors(folder):
        show("bench ingest", run(images, folder, console.log), json)


@bench.command("manifest")
def bench_manifest(
    images: Annotated[int, typer.Option(min=1, help="Images of the dataset; default: as WebFace42M.")] = 42_474_558,
    identities: Annotated[int, typer.Option(min=1, help="Identities of the dataset.")] = 2_059_906,
    shards: Annotated[int, typer.Option(min=1, help="Shards of the dataset.")] = 5000,
    workers: Annotated[int, typer.Option(min=1, help="Workers of the run; the last one is measured.")] = 64,
    json: Json = None,
) -> None:
    """Measure how a dataset of WebFace42M's size opens, plans an epoch and resumes, on shards without pixels."""
    from pipelines.bench.manifest import bench_manifest as run

    rows, figures = run(images, identities, shards, workers, console.log)
    show_table(rows, "seconds, and growth of peak memory")
    write_json("bench manifest", figures, json)


@bench.command("plan")
def bench_plan(
    repeats: Annotated[int, typer.Option(min=1, help="Calibrations and measurements; figures are medians.")] = 7,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, with commas.")] = "1,2,4",
    json: Json = None,
) -> None:
    """Predict a training step on this machine's processors from a few timed operators, and measure it, by part."""
    from pipelines.bench.plan import bench_plan as run

    rows, figures = run(repeats, [int(number) for number in ranks.split(",")], console.log)
    show_table(rows, "rank 0, one thread a rank")
    write_json("bench plan", figures, json)


@bench.command("masks")
def bench_masks(
    images: Annotated[
        int, typer.Option(min=100, help="Images of each turn; figures are medians of three turns.")
    ] = 3000,
    json: Json = None,
) -> None:
    """Measure masks a second on one core by both mask tools, against a plain 2D mask."""
    from pipelines.bench.data import bench_masks as run

    show("bench masks", run(images), json)


@bench.command("schedule")
def bench_schedule(
    steps: Annotated[int, typer.Option(min=1000, help="Steps of the drawn loss log.")] = 200_000,
    json: Json = None,
) -> None:
    """Measure FastFace's time per step against a window that is summed anew at each step."""
    from pipelines.bench.schedule import bench_schedule as run

    show("bench schedule", run(steps), json)


@bench.command("latency")
def bench_latency(
    model: Annotated[
        str | None,
        typer.Option(help="One net instead of all depths: a run, a checkpoint, FILE.onnx, or weights with --net."),
    ] = None,
    net: NetName = None,
    budget_ms: Annotated[
        float, typer.Option(min=0, help="Time limit of an answer; FRUITS-1000 allows 1,000 ms.")
    ] = 1000.0,
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns; figures are their medians.")] = 7,
    trust_code: TrustCode = False,
    json: Json = None,
) -> None:
    """Time one face on one core: in PyTorch, with folded batch norm, in ONNX Runtime; list nets that fit a budget."""
    from pipelines.bench.latency import bench_latency as run
    from pipelines.bench.latency import table

    rows, figures = run(model, net, budget_ms, repeats, console.log, trust_code=trust_code)
    show_table(table(rows), "one thread, one image; an answer is decoding, alignment and the fastest form")
    fitting = f"{figures['fitting']} of {figures['nets']} nets fit {budget_ms:,g} ms"
    show_line(f"{fitting}; decoding and alignment take {figures['align_ms']:.2f} ms")
    write_json("bench latency", figures, json, rows=rows)


@bench.command("quant")
def bench_quant(
    model: Annotated[str | None, typer.Option(help="One float net instead of MobileFaceNet and R18.")] = None,
    net: NetName = None,
    weights: Annotated[int, typer.Option(min=2, max=8, help="Bits of the weights.")] = 8,
    activations: Annotated[int, typer.Option(min=2, max=8, help="Bits of the activations.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns; figures are their medians.")] = 15,
    json: Json = None,
) -> None:
    """Time one face on one core in ONNX Runtime: integer nets against float32, with file sizes."""
    from pipelines.bench.quant import bench_quant as run
    from pipelines.bench.quant import table

    rows, figures, processor = run(model, net, weights, activations, repeats, console.log)
    processor_text = ", ".join(f"{name} {value}" for name, value in processor.items())
    show_table(table(rows), f"one thread, one image; plain: PReLU as PyTorch exports it; {processor_text}")
    show("bench quant", figures, json, rows=rows, processor=processor)


@bench.command("recovery")
def bench_recovery(
    steps: Annotated[int, typer.Option(min=40, help="Steps of each of the three runs.")] = 200,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 20,
    json: Json = None,
) -> None:
    """Kill a worker, and a node of two, on this machine: measure the seconds to the next step and what was lost."""
    from pipelines.bench.recovery import bench_recovery as run

    table, figures = run(steps, save_every, console.log)
    show_table(table, "bench recovery")
    show_line(f"first step of a run after {figures['seconds_start']:.1f} s")
    write_json("bench recovery", figures, json)
