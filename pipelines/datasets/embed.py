"""Embed a whole dataset, shard by shard, with Ray Data actors that hold the net. A stopped job can continue."""

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
from pipelines.machines import capacity, cluster_machines
from pipelines.on_ray import Row, map_rows
from pipelines.ray_start import start_ray


class ShardEmbedder:
    """Ray actor that opens the net once and embeds one shard per call.

    Raises:
        UserError: the weights changed since ``facts`` were made.
    """

    def __init__(
        self, ref: str, net: str | None, shards: AnyPath, out: Path, facts: Facts, trust_code: bool, threads: int
    ) -> None:
        use_processor(threads)
        self.recogniser, self.dataset = open_net(ref, net, trust_code=trust_code), open_dataset(shards)
        if weights_checksum(self.recogniser) != facts.net:
            raise UserError(f"{ref} changed while bigface used it: name one of its checkpoints")
        self.out, self.facts, self.threads = out, facts, ThreadPoolExecutor(threads)

    def __call__(self, row: Row) -> Row:
        """Write the embeddings of shard ``row["shard"]``, with one row group of images in memory at a time.

        Raises:
            UserError: embeddings that are not finite.
        """
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
            mend = "use another checkpoint"
            raise UserError(f"the net's embeddings of {self.facts.files[shard]} are not finite, or all 0: {mend}")
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
    trust_code: bool = False,
) -> Embeddings:
    """Embed every image of a dataset, or continue a stopped job.

    Args:
        ref, net, trust_code: arguments of :func:`fr_core.nets.open.open_net`.
        shards: folder or URL of the dataset.
        out: local folder; on a cluster, a folder that all nodes share.
        flip: whether to add the embedding of the mirrored image, as the verification protocols do.
        on_ray: whether Ray actors do the work: one for each GPU, or one for each CPU if the cluster has no GPU.
            Otherwise this process does.
        own_folder: whether to write into a subfolder of ``out`` named after the dataset and the net.
        progress: called with the images done and the total.

    Raises:
        UserError: no dataset, no net, ``out`` in use or not writable, or embeddings that are not finite.
    """
    dataset, place = open_dataset(shards), to_path(ref)
    if place.is_dir():
        place = find_checkpoint(place)  # every actor opens the checkpoint that is newest now
    ref = str(place.resolve())
    recogniser = open_net(ref, net, trust_code=trust_code)
    numbers = range(len(dataset.manifest.shards))
    facts = Facts(
        dataset=dataset.stamp,
        net=weights_checksum(recogniser),
        flip=flip,
        embedding=recogniser.net.embedding,
        images=dataset.manifest.images,
        files=tuple(f"embeddings-{shard:05d}.parquet" for shard in numbers),
    )
    if own_folder:
        out = out / f"{facts.dataset[:8]}-{facts.net[:8]}"
    own_files = ("embeddings-*.parquet", "embeddings-*.part", BY_ID.format("*"))
    begin_job(out, FACTS, facts.model_dump_json(indent=1) + "\n", own_files, overwrite)
    missing = [shard for shard in numbers if not (out / facts.files[shard]).is_file()]
    done = sum(dataset.manifest.shards[shard].images for shard in numbers if shard not in set(missing))
    progress(done, facts.images)
    actor = (ref, net, dataset.root.resolve(), out.resolve(), facts, trust_code)
    run = _embed_on_ray if on_ray else _embed_here
    for result in run(actor, missing):
        done += result["images"]
        progress(done, facts.images)
    return open_embeddings(out)


def weights_checksum(recogniser: Recogniser) -> str:
    """Return a checksum of the weights, the same on every device.

    What a file of another project was taken for counts too: the same weights may see other pixels.
    """
    if isinstance(recogniser.net, OnnxNet) and not recogniser.taken_for:
        return recogniser.net.checksum
    digest = hashlib.sha256((recogniser.taken_for or "").encode())
    if isinstance(recogniser.net, OnnxNet):
        digest.update(recogniser.net.checksum.encode())
    for name, tensor in sorted(recogniser.net.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


ActorArgs = tuple[str, str | None, AnyPath, Path, Facts, bool]  # arguments of ShardEmbedder without the threads


def _embed_here(actor: ActorArgs, shards: list[int]) -> Iterator[Row]:
    embedder = ShardEmbedder(*actor, torch.get_num_threads())  # OMP_NUM_THREADS, or the number of cores
    return (embedder({"shard": shard}) for shard in shards)


def _embed_on_ray(actor: ActorArgs, shards: list[int]) -> Iterator[Row]:
    start_ray()
    cpus, gpus = map(int, capacity(cluster_machines()))
    actors = min(len(shards), gpus or cpus)
    per_actor = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
    rows = [{"shard": shard} for shard in shards]
    yield from map_rows(rows, ShardEmbedder, fn_constructor_args=(*actor, 1), concurrency=(1, actors), **per_actor)
