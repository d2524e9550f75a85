"""Run every stage on one machine: draw faces, write shards, train on Ray workers, verify on unseen people."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from fr_core import rng
from fr_core.config.recipes import load_config
from fr_core.data.synthetic import write_faces
from fr_core.nets.build import build_net
from fr_core.nets.open import Recogniser, open_net
from fr_core.verify.baselines import colour_histogram, raw_pixels
from fr_core.verify.pairs import write_pairs
from fr_core.verify.report import contact_sheet, make_report, roc_figure, verification_figures, write_report
from fr_core.verify.suites import verify
from pipelines.datasets.ingest import ingest
from pipelines.train import train

IDENTITIES, SHOTS = 600, 16
UNSEEN_IDENTITIES, UNSEEN_SHOTS = 120, 10
PAIRS_PER_FOLD = 300


def demo(out: Path, workers: int, recipe: str, overrides: list[str], say: Callable[[str], None]) -> dict[str, float]:
    """Run every stage into ``out``.

    Args:
        recipe: a TOML file, or the name of a shipped recipe.
        overrides: ``key.path=value`` for the recipe.
        say: called with a line at the start and at the end of each stage.

    Returns:
        The figures of ``report.json``.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        say(f"{name} …")
        started = time.monotonic()
        yield
        seconds[f"seconds_{name}"] = time.monotonic() - started
        say(f"{name}: {seconds[f'seconds_{name}']:.1f} s")

    with stage("synth"):
        write_faces(out / "faces", IDENTITIES, SHOTS)
        write_faces(out / "unseen", UNSEEN_IDENTITIES, UNSEEN_SHOTS, first_identity=IDENTITIES)
        write_pairs(out / "unseen", PAIRS_PER_FOLD)
    with stage("ingest"):
        ingest(out / "faces" / "images", out / "shards", landmarks=out / "faces" / "landmarks.csv", overwrite=True)
    images, pairs = out / "unseen" / "images", out / "unseen" / "pairs.csv"
    paths = (f"data.path={out / 'shards'}", f"verify.images={images}", f"verify.pairs={pairs}")
    config = load_config(recipe, [*paths, *overrides])
    with stage("train"):
        trained = train(config, out, workers, overwrite=True, recipe=recipe)
    with stage("verify"):
        torch.manual_seed(rng.torch_seed(config.seed, "untrained"))
        untrained = Recogniser(build_net(config.net).eval(), torch.device("cpu"))
        nets: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "raw_pixel": raw_pixels,
            "colour_histogram": colour_histogram,
            "untrained": untrained.embed,
            "trained": open_net(out, trust_code=True).embed,  # the config above names its code
        }
        results = {name: verify(embed, images, pairs, config.net.input_size) for name, embed in nets.items()}
    pictures = out / "pictures"
    curves = {name: (result.scores, result.pairs.same) for name, result in results.items()}
    roc_figure(curves).savefig(pictures / "roc_against_floors.png")
    faces_figure(out / "faces" / "images").savefig(pictures / "faces.png")
    figures = {f"{name}_accuracy": result.verification.accuracy for name, result in results.items()}
    figures |= verification_figures(results["trained"].verification)
    figures |= {k: v for k, v in trained.items() if k not in figures} | seconds
    figures["unseen_identities"] = UNSEEN_IDENTITIES
    shown = sorted(f"pictures/{path.name}" for path in pictures.glob("*.png"))
    content = make_report("demo", figures, run=str(out), config=config.model_dump(mode="json"), pictures=shown)
    write_report(out / "report.json", content)
    return figures


def faces_figure(images: Path, identities: int = 8, shots: int = 12) -> Figure:
    """Draw a contact sheet with one identity a row."""
    from fr_core.data.photos import read_rgb

    folders = sorted(p for p in images.iterdir() if p.is_dir())[:identities]
    faces = [read_rgb(p.read_bytes()) for folder in folders for p in sorted(folder.iterdir())[:shots]]
    columns = min(shots, len(faces) // len(folders))
    return contact_sheet(np.stack(faces), columns, "synthetic faces, one identity a row")
