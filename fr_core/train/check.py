"""Checks of a config against its data and its number of workers, before anything trains.

The launcher checks every number of workers that a run may have; ``train_loop`` checks the actual number again.
``fr_core/config/__init__.py`` checks everything that needs no data.
"""

from pathlib import Path

import torch

from fr_core.config import Config, class_count, step_images, total_steps, unlabelled_batch
from fr_core.config.nets import QuantisedNet
from fr_core.data.plan import Plan
from fr_core.data.schema import Dataset, open_dataset
from fr_core.data.stream import make_plan, unlabelled
from fr_core.errors import UserError
from fr_core.optim.fastface import watcher
from fr_core.train.distill import open_teacher
from fr_core.verify.pairs import read_pairs


def checked_plan(config: Config, *workers: int) -> Plan:
    """Return the plan of a run that fits all these numbers of workers, after checking its pairs and its teacher.

    Raises:
        UserError: as :func:`fitting_plan` and :func:`check_pairs`, or the teacher does not fit.
    """
    plan = fitting_plan(config, open_training_data(config), *workers)
    check_pairs(config)
    open_teacher(config, plan.dataset, torch.device("cpu"))
    return plan


def open_training_data(config: Config) -> Dataset:
    """Open the training data.

    Raises:
        UserError: ``data.path`` is not set, or holds no dataset.
    """
    if not config.data.path:
        raise UserError("data.path is not set: give data.path=SHARDS, a folder that `bigface ingest` made")
    return open_dataset(config.data.path)


def fitting_plan(config: Config, dataset: Dataset, *workers: int) -> Plan:
    """Return the plan of a run, if config, data and all these numbers of workers fit together.

    Raises:
        UserError: the workers, batch, centres, class images, learning rates or FastFace's stretch do not fit. Or a
            quantised net has no trained net to start from.
    """
    if isinstance(config.net, QuantisedNet) and not config.init.backbone:
        raise UserError(
            'net.kind = "quantised" is made of a trained net: give init.backbone=RUN, or use `bigface quantize RUN`'
        )
    plan = make_plan(config, dataset)
    for number in workers:
        check_workers(config, plan, number)
    config.method.centres(class_count(config, dataset.manifest.identities), config.train.global_batch)
    watcher(config.schedule, total_steps(config, plan.steps_per_epoch), config.train.global_batch)
    if config.optim.head_rate_unknown and config.method.class_matrix:
        raise UserError(
            f"the class matrix moves by SGD, whose rate is not that of {config.optim.kind}: give optim.head.lr"
        )
    return plan


def check_pairs(config: Config) -> None:
    """Check the verification pairs, if the config names any.

    Raises:
        UserError: the pairs cannot be read, or the folder of their images does not exist.
    """
    if config.verify.pairs:
        read_pairs(config.verify.pairs)
        if config.verify.images and not Path(config.verify.images).is_dir():
            raise UserError(f"verify.images: {config.verify.images}: no such folder")


def check_workers(config: Config, plan: Plan, workers: int) -> None:
    """Check that a run fits a number of workers.

    Raises:
        UserError: the lanes, batches, identities or ghost batches do not fit.
    """
    plan.lanes_of(0, workers)
    identities = plan.dataset.manifest.identities
    if workers > identities:
        raise UserError(f"{workers} workers for {identities} identities; use fewer workers")
    check_shares(config, workers)
    if other := unlabelled(config):
        if unlabelled_batch(config) % (workers * config.train.accumulate):
            raise UserError(
                f"method.distill.unlabelled.batch = {unlabelled_batch(config)} is not a multiple of "
                f"{workers} workers × train.accumulate = {config.train.accumulate}"
            )
        other[1].lanes_of(0, workers)


def check_shares(config: Config, workers: int) -> None:
    """Check that a number of workers can split the global batch, and that ghost batches divide a worker's part.

    Raises:
        UserError: they do not.
    """
    batch, accumulate, multiple = config.train.global_batch, config.train.accumulate, config.method.facts.batch_multiple
    if batch % (workers * accumulate):
        raise UserError(
            f"train.global_batch = {batch} is not a multiple of {workers} workers × train.accumulate = {accumulate}"
        )
    if batch // (workers * accumulate) % multiple:
        raise UserError(
            f"each of {workers} workers needs a multiple of {multiple} images for {config.method.kind}: "
            f"train.global_batch must be a multiple of {multiple * workers * accumulate}"
        )
    images, ghost = step_images(config)[0] // workers, config.train.ghost_batch
    if ghost and images % ghost:
        raise UserError(
            f"train.ghost_batch = {ghost} does not divide the {images} images that each of {workers} workers trains on "
            f"at once: use a divisor of {images}"
        )
