"""Embeddings of a whole dataset, a shard at a time, by Ray Data actors that hold the net; what was stopped goes on."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from fr_core.data.decode import decode, resized
from fr_core.data.embeddings import FACTS, Embeddings, Facts, open_embeddings, write_embeddings
from fr_core.data.schema import open_dataset
from fr_core.data.store import AnyPath, to_path, write_text_atomically
from fr_core.device import use_processor
from fr_core.errors import UserError
from fr_core.nets.open import Recogniser, open_net


class ShardEmbedder:
    """An actor: opens the net once, then embeds shard after shard."""

    def __init__(self, ref: str, net: str | None, shards: AnyPath, out: Path, flip: bool, threads: int) -> None:
        use_processor(threads)
        self.recogniser, self.dataset = open_net(ref, net), open_dataset(shards)
        self.out, self.flip, self.threads = out, flip, ThreadPoolExecutor(threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Writes the embeddings of shard ``row["shard"]``, a row group of images in memory at a time."""
        shard, size = int(row["shard"]), self.recogniser.net.input_size
        ids, labels, embeddings = [], [], []
        for group in range(len(self.dataset.manifest.shards[shard].row_groups)):
            images = self.dataset.read_images(shard, group)
            pixels = self.threads.map(lambda jpeg: resized(decode(jpeg), size), [jpeg for _, _, jpeg, _ in images])
            embeddings.append(self.recogniser.embed(np.stack(list(pixels)), self.flip))
            ids += [sample_id for sample_id, *_ in images]
            labels += [label for _, label, *_ in images]
        write_embeddings(self.out / file_name(shard), np.array(ids), np.array(labels), np.concatenate(embeddings))
        return {"images": len(ids)}


def embed(
    ref: str,
    shards: AnyPath,
    out: Path,
    net: str | None = None,
    flip: bool = True,
    on_ray: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Embeddings:
    """Embeds every image of a dataset, or goes on with an embedding that was begun.

    Args:
        ref, net: as :func:`fr_core.nets.open.open_net` takes them.
        shards: local, or at a URL; ``out`` is local (to all nodes of a cluster).
        flip: add the embedding of the mirrored image, as the verification protocols do.
        on_ray: one actor for each card of the cluster, or without cards for each CPU; otherwise in this process.
        progress: called with images done and in all.

    Raises:
        UserError: no dataset, no net, ``out`` holds other embeddings or cannot be written.
    """
    dataset = open_dataset(shards)
    if (out / "manifest.json").exists():
        raise UserError(f"{out} holds a dataset; write the embeddings somewhere else")
    recogniser = open_net(ref, net)
    number = range(len(dataset.manifest.shards))
    facts = Facts(
        dataset=dataset.stamp,
        net=weights_checksum(recogniser),
        flip=flip,
        embedding=recogniser.net.embedding,
        images=dataset.manifest.images,
        files=tuple(map(file_name, number)),
    )
    prepare(out, facts, overwrite)
    rest = [shard for shard in number if not (out / file_name(shard)).is_file()]
    done = sum(dataset.manifest.shards[shard].images for shard in number if shard not in set(rest))
    progress(done, facts.images)
    actor = (str(to_path(ref).resolve()), net, shards.resolve(), out.resolve(), flip)
    for result in (_by_ray if on_ray else _here)(actor, rest):
        done += result["images"]
        progress(done, facts.images)
    return open_embeddings(out)


def file_name(shard: int) -> str:
    return f"shard-{shard:05d}.parquet"


def prepare(out: Path, facts: Facts, overwrite: bool) -> None:
    """Makes the folder; one in which the same embeddings were begun is left as it is.

    Raises:
        UserError: it holds something else, or cannot be written.
    """
    text = facts.model_dump_json(indent=1) + "\n"
    try:
        begun = out / FACTS
        if begun.is_file() and not overwrite and begun.read_text() == text:
            return
        if out.exists() and any(out.iterdir()) and not overwrite:
            raise UserError(f"{out} is not empty, and holds no begun embeddings of this data by this net; --overwrite")
        out.mkdir(parents=True, exist_ok=True)
        for old in (*out.glob("shard-*.parquet"), *out.glob("shard-*.part")):
            old.unlink()
        write_text_atomically(begun, text)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def weights_checksum(recogniser: Recogniser) -> str:
    """Tells one net from another, wherever its weights lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(recogniser.net.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


Actor = tuple[str, str | None, AnyPath, Path, bool]  # what a ShardEmbedder is made of, but for its threads


def _here(actor: Actor, shards: list[int]) -> Iterator[dict[str, Any]]:
    embedder = ShardEmbedder(*actor, torch.get_num_threads())  # OMP_NUM_THREADS, or the cores that there are
    return (embedder({"shard": shard}) for shard in shards)


def _by_ray(actor: Actor, shards: list[int]) -> Iterator[dict[str, Any]]:
    import ray

    from pipelines.on_ray import start_ray

    if not shards:
        return
    start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    resources: dict[str, float] = ray.cluster_resources()
    cards = int(resources.get("GPU", 0))
    actors = min(len(shards), cards or int(resources["CPU"]))
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    results = rows.map(
        cast(Any, ShardEmbedder),
        fn_constructor_args=(*actor, 1),
        concurrency=(1, actors),
        num_cpus=0 if cards else 1,
        num_gpus=1 if cards else 0,
    )
    yield from results.iter_rows()
