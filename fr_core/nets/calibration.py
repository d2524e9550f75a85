"""Calibration: passes without a gradient measure the ranges of a quantised net's activations.

docs/quantisation.md shows the command, docs/methods/quantface.md the theory.

Legend: B batch, C channels, I input and O output channels, H W pixels, V values, S candidates for an
end of a range. SS1 has an entry for each pair of ends, SSV for each pair and value.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from fr_core.config.nets import QuantisedNet
from fr_core.errors import UserError
from fr_core.nets.quantised import Quantised
from fr_core.nets.quantised_layers import QuantConv, QuantPReLU, ResidualPath, Weighted
from fr_core.ranks import Ranks

EQUALISING = 8  # batches that equalisation looks at
POSITIONS = 256  # sampled values of each image's map
BINS = 1024  # of the histogram of sampled values
EXTREMES = 0.1  # weight of an image's least and greatest value: the sample has more extremes than the map
SHARES = 20  # candidates for either end of a range


@torch.no_grad()
def calibrate(net: Quantised, images: Callable[[], Iterable[Tensor]], ranks: Ranks, config: QuantisedNet) -> None:
    """Set the ranges of activations by their values on some images; all ranks set the same ranges.

    During calibration the weights are quantised and the activations are not.

    Args:
        images: Each call starts again with batches of normalised pixels [B, 3, H, W]. All ranks have equal sizes.

    Raises:
        UserError: The outputs of a layer are all 0, or not finite.
    """
    net.train()
    if config.equalise:
        _equalise(net, itertools.islice(images(), EQUALISING), ranks)
    quantisers = net.ranges()
    seen: dict[str, list[Tensor]] = {name: [] for name in quantisers}
    slopes = {prelu.inputs[0]: prelu.slope for prelu in net.modules() if isinstance(prelu, QuantPReLU) and prelu.inputs}
    for name, quantiser in quantisers.items():
        slope_C = slopes.get(quantiser)
        quantiser.observer = lambda x, parts=seen[name], slope_C=slope_C: parts.append(_sample(x, slope_C))
    for x_BCHW in images():
        net(x_BCHW)
    for name, quantiser in quantisers.items():
        quantiser.observer = None
        seen_V, counts_V = ranks.gather(torch.cat(seen.pop(name))).cpu().unbind(1)  # where sums have one order
        low, high = seen_V.amin().clamp(max=0), seen_V.amax().clamp(min=0)
        if not seen_V.isfinite().all():
            raise UserError(f"calibration: outputs of layer {name} are not finite: start from unbroken weights")
        if low == high:
            raise UserError(
                f"calibration: all {len(seen_V)} sampled outputs of layer {name} are 0: start from a net without dead "
                "layers"
            )
        quantiser.set_range(
            *((low, high) if config.ranges == "extremes" else least_error(seen_V, counts_V, quantiser.bits))
        )
    net.eval()


def least_error(seen_V: Tensor, counts_V: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the ends of the range whose 2^bits codes have the least sum of squared errors.

    The candidates for an end are shares of the extreme value on that side.

    Args:
        seen_V: Values to be quantised.
        counts_V: Weight of each value's error.
        bits: Width of the codes.
    """
    low, high = seen_V.amin().clamp(max=0), seen_V.amax().clamp(min=0)
    bins_V = ((seen_V - low) / (high - low) * BINS).long().clamp(max=BINS - 1)
    histogram_V = torch.zeros(BINS).index_add_(0, bins_V, counts_V)
    middle_V = low + (high - low) * (torch.arange(BINS) + 0.5) / BINS
    shares_S = torch.arange(1, SHARES + 1) / SHARES
    low_SS1, high_SS1 = (low * shares_S)[:, None, None], (high * shares_S)[None, :, None]
    scale_SS1 = (high_SS1 - low_SS1) / (2**bits - 1)
    zero_SS1 = (-low_SS1 / scale_SS1).round()
    codes_SSV = ((middle_V / scale_SS1).round() + zero_SS1).clamp(0, 2**bits - 1)
    error_SS = (((codes_SSV - zero_SS1) * scale_SS1 - middle_V).square() * histogram_V).sum(2)
    best_low, best_high = divmod(int(error_SS.argmin()), SHARES)
    return low * shares_S[best_low], high * shares_S[best_high]


def _sample(x: Tensor, slope_C: Tensor | None) -> Tensor:
    """Sample values and the weights of their errors [V, 2]: some positions of every image, and its extremes.

    A following PReLU multiplies the errors of negative values by its slope.
    """
    x_BV = x.float().movedim(1, -1).flatten(1)  # a view where channels come last
    positions = torch.randint(x_BV.shape[1], (POSITIONS,), generator=torch.Generator().manual_seed(0)).to(x.device)
    at_BV = torch.cat([positions.expand(len(x), -1), x_BV.argmin(1)[:, None], x_BV.argmax(1)[:, None]], 1)
    values_BV = x_BV.gather(1, at_BV)
    counts_BV = torch.ones_like(values_BV)
    counts_BV[:, POSITIONS:] = EXTREMES
    if slope_C is not None:
        counts_BV *= torch.where(values_BV < 0, slope_C[at_BV % len(slope_C)] ** 2, 1)
    return torch.stack([values_BV.flatten(), counts_BV.flatten()], 1)


def _equalise(net: Quantised, images_BCHW: Iterable[Tensor], ranks: Ranks) -> None:
    """Equalise channel ranges between two layers, so that one range fits all channels. The float net stays the same.

    A positive factor passes through a PReLU. It divides the outputs of the first layer and multiplies the inputs of
    the next one (Nagel et al., "Data-free quantization", 2019). Weights have a scale for each output channel, so the
    factor costs the first layer no precision, nor a depthwise next layer. A dense next layer takes the square root,
    the middle between both layers (Xiao et al., "SmoothQuant", 2023).
    """
    pairs = list(_neighbours(net))
    largest: list[list[Tensor]] = [[] for _ in pairs]
    for quantiser in net.ranges().values():
        quantiser.observer = lambda x: None
    hooks = [
        before.layer.register_forward_hook(lambda _, __, x, seen=seen: seen.append(x.abs().amax((2, 3)).mean(0)))
        for (before, _), seen in zip(pairs, largest, strict=True)
    ]
    for x_BCHW in images_BCHW:
        net(x_BCHW)
    for hook in hooks:
        hook.remove()
    for (before, readers), seen in zip(pairs, largest, strict=True):
        range_C = ranks.sum_(torch.stack(seen).mean(0)) / ranks.size
        dense = [after.layer.weight for after in readers if after.layer.weight.shape[1] > 1]  # [O, I, …]
        factor_C = range_C
        if dense:
            reach_I = torch.cat([weight.abs().transpose(0, 1).flatten(1) for weight in dense], 1).amax(1)
            factor_C = (range_C / reach_I.clamp(min=1e-8)).sqrt()
        # The bounds leave a nearly dead channel as it is. The check of ranges names a dead layer later.
        factor_C = (factor_C / factor_C.mean().clamp(min=1e-8)).clamp(min=1e-2)
        before.layer.weight.div_(factor_C[:, None, None, None])
        before.layer.bias.div_(factor_C)
        for after in readers:
            weight = after.layer.weight
            depthwise = weight.shape[1] == 1
            weight.mul_(factor_C.view(-1, 1, 1, 1) if depthwise else factor_C.view(1, -1, *[1] * (weight.ndim - 2)))


def _neighbours(net: Quantised) -> Iterator[tuple[QuantConv, list[Weighted]]]:
    """Yield each convolution whose output is read by layers with weights only, and these layers."""
    for chain in (module for module in net.modules() if isinstance(module, nn.Sequential)):
        layers = [layer for layer in chain if not isinstance(layer, QuantPReLU | nn.Flatten)]
        for before, after in itertools.pairwise(layers):
            readers = [after.branch[0], after.skip] if isinstance(after, ResidualPath) else [after]
            weighted = [reader for reader in readers if isinstance(reader, Weighted)]
            if isinstance(before, QuantConv) and len(weighted) == len(readers):
                yield before, weighted
