"""Starts a run from a trained backbone, on the same or on new identities.

Legend: B batch, G global batch, D embedding, S this rank's rows of the class matrix, or their classes.
"""

import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fr_core.config import Config, class_rows
from fr_core.config.nets import QuantisedNet
from fr_core.data.store import to_path
from fr_core.data.stream import Batch
from fr_core.errors import UserError
from fr_core.heads.sharded_fc import INIT_STD, ShardedFC
from fr_core.nets.backbone import normalised
from fr_core.nets.checkpoint_files import find_checkpoint, known_rows, read_identities
from fr_core.nets.open import load_weights, open_float
from fr_core.ranks import Ranks
from fr_core.train.precision import autocast
from fr_core.train.state import TrainState
from fr_core.train.statistics import input_moments, unfolded_norms

log = logging.getLogger("bigface")

SETTLING = 1000  # images on which norms that were folded are measured


def load_backbone(config: Config, state: TrainState, ranks: Ranks) -> None:
    """Load the weights of ``init.backbone`` into a new state.

    Raises:
        UserError: there are no such weights, or they do not fit the net.
    """
    if config.init.backbone is None:
        return
    if isinstance(config.net, QuantisedNet):
        from fr_core.nets.quantised import Quantised

        made = Quantised(open_float(config.net.net, config.init.backbone, config.init.net), config.net)
        state.backbone.load_state_dict(made.state_dict())
    else:
        family = load_weights(state.backbone, config.init.backbone, config.init.net, config.train.trust_code).family
        if family and ranks.rank == 0:
            log.info("%s: %s: %s", config.init.backbone, family.title, family.input)
    _copy_weights(state)


def calibrate(config: Config, state: TrainState, start: Callable[[], Iterable[Batch]], ranks: Ranks) -> None:
    """Calibrate the activation ranges of a quantised net.

    Args:
        start: returns the calibration batches from the first one; called once per pass.

    Raises:
        UserError: as :func:`fr_core.nets.calibration.calibrate`.
    """
    from fr_core.nets.calibration import calibrate as calibrated
    from fr_core.nets.quantised import Quantised

    net = state.backbone
    assert isinstance(config.net, QuantisedNet)
    assert isinstance(net, Quantised)

    def images() -> Iterator[Tensor]:
        return (normalised(batch.images_BHWC.to(state.device), net) for batch in start())

    calibrated(net, images, ranks, config.net)
    _copy_weights(state)


@torch.no_grad()
def settle_norms(config: Config, state: TrainState, start: Callable[[int], Iterable[Batch]], ranks: Ranks) -> None:
    """Measure the norms that a file had folded into convolutions, without changing what the net computes in eval mode.

    Such a norm was read as one that adds its shift and does nothing else. In training it would normalise, and so
    change the net at once. With the statistics of its input, and a gain and shift that undo them, it does not. A frozen
    norm stays in eval mode, and needs neither.

    Args:
        start: returns this rank's first batches, as many as it is told, without augmentation.
    """
    frozen = {state.backbone.get_submodule(name) for name in state.frozen}
    norms = [norm for norm in unfolded_norms(state.backbone) if norm not in frozen]
    if not norms:
        return
    steps = min(-(-SETTLING // config.train.global_batch), state.plan.steps_per_epoch)
    moments = input_moments(config, state, state.backbone.eval(), norms, start(steps), ranks)
    for norm, (mean_C, variance_C) in zip(norms, moments, strict=True):
        norm.get_buffer("running_mean").copy_(mean_C)
        norm.get_buffer("running_var").copy_(variance_C)
        norm.weight.copy_((variance_C + norm.eps).sqrt())
        norm.bias.add_(mean_C)
    _copy_weights(state)


def _copy_weights(state: TrainState) -> None:
    for copied in (state.average, state.encoder):
        if copied is not None:
            copied.load_state_dict(state.backbone.state_dict())


def class_matrix_of(state: TrainState) -> ShardedFC:
    """Return the class matrix of a run whose config asks for rows of a class matrix."""
    assert isinstance(state.head, ShardedFC)  # the config's rules refuse other heads
    return state.head


@torch.no_grad()
def set_prototypes(config: Config, state: TrainState, epoch: Iterable[Batch], ranks: Ranks) -> None:
    """Set the first row of each class to the mean normalised embedding of its identity's images.

    Rows are scaled to the length of random rows, so that the learning rate keeps its meaning. An identity without
    images in ``epoch`` keeps its random row. A class's other rows stay random: of equal ones only the first would move.

    Args:
        epoch: this rank's images of one epoch, not augmented.
    """
    head = class_matrix_of(state)
    first_SD = head.weight[:: class_rows(config)]
    sums_SD = torch.zeros_like(first_SD)
    state.backbone.eval()
    for batch in epoch:
        with autocast(config, state.device):
            x_BD = state.backbone(normalised(batch.images_BHWC.to(state.device), state.backbone))
        x_GD, labels_G = ranks.gather(F.normalize(x_BD.float())), ranks.gather(batch.labels_B.to(state.device))
        column_G = head.columns(labels_G)
        own_G = column_G >= 0
        sums_SD.index_add_(0, column_G[own_G], x_GD[own_G])
    seen_S = sums_SD.norm(dim=1) > 0
    length = INIT_STD * sums_SD.shape[1] ** 0.5
    first_SD[seen_S] = length * F.normalize(sums_SD[seen_S])


@torch.no_grad()
def copy_rows_by_name(config: Config, state: TrainState) -> None:
    """Copy the rows of identities that the run in ``init.backbone`` knew, matched by name.

    If its classes had fewer rows, the others stay random.

    Raises:
        UserError: ``init.backbone`` has no class matrix with names, knew none of these identities, or has more rows for
            each.
    """
    folder = find_checkpoint(to_path(config.init.backbone or ""))
    (known, variants, old_rows), rows = read_identities(folder), class_rows(config)
    if old_rows > rows:
        raise UserError(
            f'{folder}: init.head = "names", but each class has {old_rows} rows there: set '
            f'method.subcentres = {old_rows}, or give init.head = "prototypes"'
        )
    label_of = {name: label for label, name in enumerate(known)}
    old_N = torch.tensor([label_of.get(name, -1) for name in state.plan.dataset.identity_names()])
    if (old_N < 0).all():
        raise UserError(
            f'{folder}: init.head = "names", but no identity there has the name of an identity here: '
            'give init.head = "prototypes"'
        )
    head = class_matrix_of(state)
    row_S, classes_S = torch.arange(head.lo, head.hi) % rows, torch.arange(head.lo, head.hi) // rows
    label_S = old_N[classes_S // config.data.variants]
    plain_S = classes_S % config.data.variants == 0  # other variants are different warps in every run
    known_S = (label_S >= 0) & plain_S & (row_S < old_rows)
    old_S = torch.where(known_S, label_S * variants * old_rows + row_S, -1)
    head.weight[(old_S >= 0).to(state.device)] = known_rows(folder, old_S)[old_S >= 0].to(state.device)
