"""Embeddings that no net has made."""

import numpy as np

from fr_core.data.embeddings import FACTS, Facts, write_embeddings


def embedded(root, dataset, without=(), net="net", seed=0, dimensions=6):
    """Random embeddings of a dataset in shuffled files, without some samples; id -> embedding."""
    random, images = np.random.default_rng(seed), dataset.manifest.images
    vectors = random.normal(size=(images, dimensions)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    root.mkdir(exist_ok=True)
    ids = np.array([i for i in random.permutation(images) if i not in without])
    parts = np.array_split(ids, 3)
    files = tuple(f"embeddings-{part:05d}.parquet" for part in range(3))
    for file, part in zip(files, parts, strict=True):
        write_embeddings(root / file, part, np.zeros(len(part), int), vectors[part])
    facts = Facts(dataset=dataset.stamp, net=net, flip=True, embedding=dimensions, images=images, files=files)
    (root / FACTS).write_text(facts.model_dump_json())
    return vectors
