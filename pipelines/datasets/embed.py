"""Embeddings of a whole dataset, a shard at a time, by Ray Data actors that hold the net; what was stopped goes on."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from fr_core.data.decode import decode, resized
from fr_core.data.embeddings import BY_ID, FACTS, Embeddings, Facts, open_embeddings, write_embeddings
from fr_core.data.schema import open_dataset
from fr_core.data.store import AnyPath, begin_job, to_path
from fr_core.device import use_processor
from fr_core.errors import UserError
from fr_core.nets.checkpoint_files import find_checkpoint
from fr_core.nets.onnx_net import OnnxNet
from fr_core.nets.open import Recogniser, open_net
from pipelines.on_ray import Row, capacity, cluster_machines, mapped, start_ray


class ShardEmbedder:
    """An actor: opens the net once, then embeds shard after shard.

    Raises:
        UserError: the weights are not those that ``facts`` were made of.
    """

    def __init__(self, ref: str, net: str | None, shards: AnyPath, out: Path, facts: Facts, threads: int) -> None:
        use_processor(threads)
        self.recogniser, self.dataset = open_net(ref, net), open_dataset(shards)
        if weights_checksum(self.recogniser) != facts.net:
            raise UserError(f"{ref} changed while it was used; name one of its checkpoints")
        self.out, self.facts, self.threads = out, facts, ThreadPoolExecutor(threads)

    def __call__(self, row: Row) -> Row:
        """Writes the embeddings of shard ``row["shard"]``, a row group of images in memory at a time."""
        shard, size = int(row["shard"]), self.recogniser.net.input_size
        ids, labels, parts = [], [], []
        for group in range(len(self.dataset.manifest.shards[shard].row_groups)):
            images = self.dataset.read_images(shard, group)
            pixels = self.threads.map(lambda jpeg: resized(decode(jpeg), size), [jpeg for _, _, jpeg, _ in images])
            parts.append(self.recogniser.embed(np.stack(list(pixels)), self.facts.flip))
            ids += [sample_id for sample_id, *_ in images]
            labels += [label for _, label, *_ in images]
        embeddings = np.concatenate(parts)
        if not np.isfinite(embeddings).all():
            raise UserError("the net's embeddings are not finite")
        write_embeddings(self.out / self.facts.files[shard], np.array(ids), np.array(labels), embeddings)
        return {"images": len(ids)}


def embed(
    ref: str,
    shards: AnyPath,
    out: Path,
    net: str | None = None,
    flip: bool = True,
    on_ray: bool = True,
    overwrite: bool = False,
    own_folder: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Embeddings:
    """Embeds every image of a dataset, or goes on with an embedding that was begun.

    Args:
        ref, net: as :func:`fr_core.nets.open.open_net` takes them.
        shards: local, or at a URL; ``out`` is local (to all nodes of a cluster).
        flip: add the embedding of the mirrored image, as the verification protocols do.
        on_ray: one actor for each card of the cluster, or without cards for each CPU; otherwise in this process.
        own_folder: in ``out`` a folder for these data and this net.
        progress: called with images done and in all.

    Raises:
        UserError: no dataset, no net, ``out`` holds something else or cannot be written, or embeddings not finite.
    """
    dataset, place = open_dataset(shards), to_path(ref)
    if place.is_dir():
        place = find_checkpoint(place)  # the one that is newest now, for all actors
    ref = str(place.resolve())
    recogniser = open_net(ref, net)
    number = range(len(dataset.manifest.shards))
    facts = Facts(
        dataset=dataset.stamp,
        net=weights_checksum(recogniser),
        flip=flip,
        embedding=recogniser.net.embedding,
        images=dataset.manifest.images,
        files=tuple(f"embeddings-{shard:05d}.parquet" for shard in number),
    )
    if own_folder:
        out = out / f"{facts.dataset[:8]}-{facts.net[:8]}"
    own = ("embeddings-*.parquet", "embeddings-*.part", BY_ID.format("*"))
    begin_job(out, FACTS, facts.model_dump_json(indent=1) + "\n", own, overwrite)
    rest = [shard for shard in number if not (out / facts.files[shard]).is_file()]
    done = sum(dataset.manifest.shards[shard].images for shard in number if shard not in set(rest))
    progress(done, facts.images)
    actor = (ref, net, dataset.root.resolve(), out.resolve(), facts)
    for result in (_by_ray if on_ray else _here)(actor, rest):
        done += result["images"]
        progress(done, facts.images)
    return open_embeddings(out)


def weights_checksum(recogniser: Recogniser) -> str:
    """Tells one net from another, wherever its weights lie."""
    if isinstance(recogniser.net, OnnxNet):
        return recogniser.net.checksum
    digest = hashlib.sha256()
    for name, tensor in sorted(recogniser.net.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


Actor = tuple[str, str | None, AnyPath, Path, Facts]  # what a ShardEmbedder is made of, but for its threads


def _here(actor: Actor, shards: list[int]) -> Iterator[Row]:
    embedder = ShardEmbedder(*actor, torch.get_num_threads())  # OMP_NUM_THREADS, or the cores that there are
    return (embedder({"shard": shard}) for shard in shards)


def _by_ray(actor: Actor, shards: list[int]) -> Iterator[Row]:
    start_ray()
    cpus, cards = map(int, capacity(cluster_machines()))
    actors = min(len(shards), cards or cpus)
    per_actor = {"num_gpus": 1, "num_cpus": 0} if cards else {"num_cpus": 1}
    rows, made = [{"shard": shard} for shard in shards], (*actor, 1)
    yield from mapped(rows, ShardEmbedder, fn_constructor_args=made, concurrency=(1, actors), **per_actor)
