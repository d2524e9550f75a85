"""Checks of a config against its data and its number of workers, before anything trains.

The launcher checks every number of workers that a run may have; ``train_loop`` checks the actual number again.
``fr_core/config/__init__.py`` checks everything that needs no data.
"""

from pathlib import Path, PurePath

import torch

from fr_core.config import Config, class_count, step_images, total_steps, unlabelled_batch, unwatched_steps
from fr_core.config.nets import QuantisedNet
from fr_core.config.sections import FineTune
from fr_core.data.plan import Plan
from fr_core.data.schema import Dataset, open_dataset
from fr_core.data.store import to_path
from fr_core.data.stream import make_plan, unlabelled
from fr_core.errors import UserError
from fr_core.nets.build import build_net
from fr_core.nets.finetune import freeze, layer_rates
from fr_core.optim.fastface import watcher
from fr_core.train.distill import open_teacher
from fr_core.verify.pair_lists import read_pairs
from fr_core.verify.pairs import Pairs


def checked_plan(config: Config, *workers: int) -> Plan:
    """Return the plan of a run that fits all these numbers of workers, after checking the files that the run names.

    Raises:
        UserError: as :func:`fitting_plan` and :func:`check_pairs`, the teacher does not fit, or ``init.backbone`` does
            not exist.
    """
    plan = fitting_plan(config, open_training_data(config), *workers)
    check_pairs(config)
    if config.init.backbone:
        start = to_path(config.init.backbone)
        if not (start.is_dir() or start.is_file()):
            raise UserError(f"init.backbone: {start}: no such run, checkpoint or weights file: give the path of one")
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
        UserError: the workers, batch, centres, class images, learning rates, warm-up or FastFace's stretch do not fit.
            Or a quantised net has no trained net to start from.
    """
    if isinstance(config.net, QuantisedNet) and not config.init.backbone:
        raise UserError(
            'net.kind = "quantised" is made of a trained net: give init.backbone=RUN, or use `bigface quantize RUN`'
        )
    plan = make_plan(config, dataset)
    for number in workers:
        check_workers(config, plan, number)
    config.method.centres(class_count(config, dataset.manifest.identities), config.train.global_batch)
    check_finetune(config)
    steps, unwatched = total_steps(config, plan.steps_per_epoch), unwatched_steps(config, plan.steps_per_epoch)
    check_warmup(config, steps / plan.steps_per_epoch)
    watcher(config.schedule, steps - unwatched, config.train.global_batch)
    if config.optim.head_rate_unknown and config.method.class_matrix:
        raise UserError(
            f"the class matrix moves by SGD, whose rate is not that of {config.optim.kind}: give optim.head.lr"
        )
    return plan


def check_warmup(config: Config, epochs: float) -> None:
    """Check that the warm-up ends before the run, which trains this many epochs; ``train.max_steps`` makes it shorter.

    Raises:
        UserError: no step follows the warm-up, so that the schedule would never begin.
    """
    warmup = config.schedule.warmup_epochs
    if 0 < epochs <= warmup:
        raise UserError(
            f"schedule.warmup_epochs = {warmup:g} leaves no step after the warm-up, since the run ends after "
            f"{epochs:.3g} epochs: give fewer, such as schedule.warmup_epochs={epochs / 10:.2g}"
        )


def check_finetune(config: Config) -> None:
    """Check that the backbone has the weights and blocks that ``finetune`` speaks of.

    Raises:
        UserError: it has not.
    """
    if config.finetune != FineTune():
        with torch.device("meta"):
            net = build_net(config.net)
        freeze(net, config.finetune.freeze)
        layer_rates(net, config.finetune.layer_decay)


def check_pairs(config: Config) -> None:
    """Check the verification pairs, if the config names any.

    Raises:
        UserError: the pairs cannot be read, their images' folder does not exist, or no pair has both images there.
    """
    if not config.verify.pairs:
        return
    pairs, folder = read_pairs(config.verify.pairs), config.verify.images
    if folder and not Path(folder).is_dir():
        raise UserError(f"verify.images: {folder}: no such folder")
    if folder and pairs.images is None:
        _check_images(Path(folder), pairs)


def _check_images(folder: Path, pairs: Pairs) -> None:
    """Check that a folder has both images of a pair. The search ends at the first such pair."""

    def holds_a_pair(root: Path) -> bool:
        both = zip(pairs.left.tolist(), pairs.right.tolist(), strict=True)
        return any((root / pairs.paths[a]).is_file() and (root / pairs.paths[b]).is_file() for a, b in both)

    if holds_a_pair(folder):
        return
    near = [place for place in (folder / "images", folder.parent) if holds_a_pair(place)]
    mend = f"give verify.images={near[0]}" if near else "give the folder that the pairs' paths are relative to"
    first = folder / pairs.paths[pairs.left[0]]
    raise UserError(f"verify.images: {folder}: none of the {len(pairs.same)} pairs has both images: no {first}: {mend}")


def trained_people(config: Config, dataset: Dataset) -> tuple[int, int]:
    """Count the people of the verification pairs that have the name of a training identity, and all their people.

    The folder of an image names its person. Both counts are 0 if the pairs have no folders, or if folders do not agree
    with the pairs.
    """
    if not config.verify.pairs:
        return 0, 0
    pairs = read_pairs(config.verify.pairs)
    names = [PurePath(path).parent.name for path in pairs.paths]
    both = zip(pairs.left.tolist(), pairs.right.tolist(), pairs.same.tolist(), strict=True)
    if not all(names) or any((names[a] == names[b]) != same for a, b, same in both):
        return 0, 0
    people = set(names)
    return len(people.intersection(dataset.identity_names())), len(people)


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
