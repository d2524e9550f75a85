"""Counted work against real passes on this processor, and against formulas written out by hand."""

from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from fr_core.config.methods import Margin
from fr_core.config.nets import IResNetNet, MobileFaceNetNet, MoENet, ViTNet
from fr_core.config.recipes import load_config
from fr_core.heads.class_queue import ClassQueue
from fr_core.heads.streamed import Softmax, TileSGD, margin_softmax
from fr_core.nets.backbone import normalised
from fr_core.nets.build import build_net, on_device
from fr_core.nets.finetune import freeze, set_mode
from fr_core.nets.ghost import use_ghost_batches
from fr_core.nets.iresnet import BLOCKS
from fr_core.ranks import Ranks
from fr_core.train.traffic import checkpoint_bytes, gradient_bytes
from fr_core.train.work import (
    Counting,
    backbone_size,
    backbone_work,
    bytes_of,
    centre_work,
    head_work,
    matrix_work,
    pair_work,
    update_work,
)

CPU, CARD = torch.device("cpu"), torch.device("cuda")
SMALL = {"width": 8, "input_size": 32, "embedding": 16}
NETS = {
    "depth 34": (IResNetNet(depth=34, **SMALL), None),
    "depth 10": (IResNetNet(depth=10, **SMALL), None),
    "squeeze, dropout": (IResNetNet(depth=18, se=True, dropout=0.2, **SMALL), None),
    "ghost batches": (IResNetNet(depth=34, **SMALL), 2),
    "mixture": (MoENet(depth=50, experts=2, **SMALL), None),
    "mobilefacenet": (MobileFaceNetNet(input_size=32), None),
    "vit": (ViTNet(depth=4, heads=2, patch=8, drop_path=0.0, mask=0.2, **SMALL), None),
    "vit that skips branches": (
        ViTNet(depth=2, heads=2, patch=8, drop_path=0.2, **SMALL),
        None,
    ),  # draws for all blocks
}


def sum_of(work, field):
    return sum(count * getattr(operator, field) for operator, count in work.items())


def without_bytes(work):
    found = Counter()
    for operator, count in work.items():
        found[operator._replace(bytes=0)] += count
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETS)
def test_fake_passes_of_a_few_blocks_count_what_real_passes_of_all_blocks_do(name, precision):
    """Operator by operator: kind, precision, FLOPs, how often, and bytes. Fake norms give statistics in bfloat16."""
    net, ghost = NETS[name]
    module = build_net(net).train()
    if ghost:
        use_ghost_batches(module, ghost)
    module = on_device(module, CPU)
    pixels_BHWC = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    x = normalised(pixels_BHWC, module)
    dtype = getattr(torch, precision)
    with Counting() as forward, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = module(x)
    gradient = torch.ones_like(out)
    with Counting() as backward:
        out.backward(gradient)
    counted = backbone_work(net, 4, 32, precision, ghost)
    for real, fake in ((forward.work, counted.forward), (backward.work, counted.backward)):
        assert without_bytes(fake) == without_bytes(real)
        assert sum_of(fake, "bytes") == pytest.approx(sum_of(real, "bytes"), rel=0.01)
        assert fake == real or precision == "bfloat16"


@pytest.mark.parametrize("ghost", [None, 2])
def test_frozen_layers_have_no_backward_pass(ghost):
    """Counted as a real pass does, whose backward pass ends at the first trained layer.

    The norm there has no gradient for its input. A fake one is written all the same: one feature map too many.
    """
    net, frozen = IResNetNet(depth=34, **SMALL), ("conv1*", "bn1*", "prelu*", "layer1.*", "layer2.0.*", "layer3.*")
    module = build_net(net)
    if ghost:
        use_ghost_batches(module, ghost)
    set_mode(module, True, freeze(module, frozen))
    x = normalised(torch.zeros(4, 32, 32, 3, dtype=torch.uint8), module := on_device(module, CPU))
    with Counting() as forward:
        out = module(x)
    gradient = torch.ones_like(out)
    with Counting() as backward:
        out.backward(gradient)
    counted = backbone_work(net, 4, 32, "float32", ghost, frozen)
    assert counted.forward == forward.work
    assert without_bytes(counted.backward) == without_bytes(backward.work)
    assert sum_of(counted.backward, "bytes") == pytest.approx(sum_of(backward.work, "bytes"), rel=0.02)
    plain = backbone_work(net, 4, 32, "float32", ghost)
    assert sum_of(counted.forward, "flops") == sum_of(plain.forward, "flops")
    assert sum_of(counted.backward, "flops") < 0.75 * sum_of(plain.backward, "flops")
    assert 0 < sum_of(counted.blocks, "flops") < sum_of(plain.blocks, "flops")  # layer1 is not recomputed


def test_frozen_weights_are_neither_moved_nor_sent():
    frozen = ("init.backbone=x", "finetune.freeze=['layer3.*']")
    config, plain = load_config("bigface_r50", frozen), load_config("bigface_r50")
    left = sum(p.numel() for n, p in build_net(plain.net).named_parameters() if n.startswith("layer3."))
    numbers = backbone_size(plain.net).numbers
    assert backbone_size(plain.net, config.finetune.freeze).numbers == numbers - left
    assert gradient_bytes(config) == 4 * (numbers - left)
    saved = checkpoint_bytes(plain, 1000, Ranks(), "float32") - checkpoint_bytes(config, 1000, Ranks(), "float32")
    assert saved == 4 * left  # their momentum
    swept = [sum_of(update_work(c, 1000, Ranks(), CARD), "bytes") for c in (plain, config)]
    assert swept[1] < swept[0] - 4 * left * 5


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_grouped_convolution_takes_as_many_flops_backward_as_twice_forward(groups):
    weight, x = torch.ones(8, 8 // groups, 3, 3, requires_grad=True), torch.ones(2, 8, 10, 10, requires_grad=True)
    with Counting() as forward:
        out = F.conv2d(x, weight, groups=groups)
    with Counting() as backward:
        out.backward(torch.ones_like(out))
    assert sum_of(forward.work, "flops") == 2 * out.numel() * weight[0].numel()
    assert sum_of(backward.work, "flops") == 2 * sum_of(forward.work, "flops")


def test_a_backbone_takes_the_flops_of_its_convolutions_by_hand():
    """IR-10: a stem, and in each stage two convolutions 3×3 and one 1×1. Pixels get no gradient."""
    images, width, side = 3, 8, 32
    stem, forward, inputs = 2 * images * side**2 * 9 * 3 * width, 0, width
    for stage, blocks in enumerate(BLOCKS[10]):
        assert blocks == 1
        outputs, small = width << stage, side >> (stage + 1)
        forward += 2 * images * 9 * inputs * outputs * (2 * small) ** 2  # before the stride
        forward += 2 * images * 9 * outputs * outputs * small**2
        forward += 2 * images * inputs * outputs * small**2
        inputs = outputs
    linear = 2 * images * inputs * (side >> 4) ** 2 * 16
    counted = backbone_work(IResNetNet(depth=10, **SMALL), images, side, "float32")
    assert sum_of(counted.forward, "flops") == stem + forward + linear
    assert sum_of(counted.backward, "flops") == stem + 2 * (forward + linear)
    assert sum_of(counted.blocks, "flops") == forward


def real_head(faces, rows, embedding, tile, fused, sampled, subcentres=1):
    """Operators of the streamed head in float32, forward and backward."""
    torch.manual_seed(0)
    unit_GD = F.normalize(torch.randn(faces, embedding)).requires_grad_()
    weight_ND = torch.randn(rows * 2 if sampled else rows, embedding, requires_grad=not fused)
    sgd = TileSGD(torch.zeros_like(weight_ND), 0.1, 0.9, 5e-4) if fused else None
    column_G = torch.arange(faces) * (rows // subcentres // faces)  # a positive in every tile
    softmax = Softmax(Margin(), tile=tile // subcentres, subcentres=subcentres)
    rows_S = 2 * torch.arange(rows) if sampled else None
    with Counting() as counting:
        margin_softmax(unit_GD, weight_ND, column_G, softmax, Ranks(), rows_S, sgd).backward()
    return counting.work


def sweeps_of(work, logits):
    """How often operators that read or write a tile's logits, but are no products, do so once, twice or thrice."""
    found = Counter()
    for operator, count in work.items():
        if not operator.flops and (accesses := operator.bytes // logits):
            found[accesses] += count
    return found


@pytest.mark.parametrize(("fused", "sampled"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_streamed_head_does_what_was_counted(fused, sampled):
    """FLOPs and sweeps over logits exactly; operators of a tile, and all bytes, within a tenth."""
    faces, rows, embedding, tiles = 256, 2048, 16, 4
    real = real_head(faces, rows, embedding, rows // tiles, fused, sampled)
    counted = matrix_work(faces, rows, tiles, embedding, "float32", fused, sampled, on_card=False)
    assert sum_of(counted, "flops") == sum_of(real, "flops") == 4 * 2 * faces * rows * embedding
    logits = 4 * faces * rows // tiles
    assert sweeps_of(counted, logits) == sweeps_of(real, logits)
    of_more_tiles = real_head(faces, rows, embedding, rows // tiles // 2, fused, sampled)
    of_a_tile = (sum(of_more_tiles.values()) - sum(real.values())) / tiles
    assert sum(counted.values()) / tiles == pytest.approx(of_a_tile, rel=0.1)
    assert sum_of(counted, "bytes") == pytest.approx(sum_of(real, "bytes"), rel=0.1)


def test_rows_of_a_class_are_counted_with_the_search_for_the_nearest():
    """FLOPs exactly, bytes within a tenth. Some logits are those of classes, so their sweeps differ in length."""
    faces, rows, embedding, tiles, each = 256, 3072, 16, 4, 3
    real = real_head(faces, rows, embedding, rows // tiles, True, False, each)
    counted = matrix_work(faces, rows, tiles, embedding, "float32", True, False, on_card=False, subcentres=each)
    assert sum_of(counted, "flops") == sum_of(real, "flops") == 4 * 2 * faces * rows * embedding
    assert sum_of(counted, "bytes") == pytest.approx(sum_of(real, "bytes"), rel=0.1)
    of_one = matrix_work(faces, rows, tiles, embedding, "float32", True, False, on_card=False)
    assert sum_of(of_one, "bytes") < 0.9 * sum_of(real, "bytes")


def real_centres(faces, centres, embedding, tile):
    """Operators of the softmax against fixed centres in float32, with a positive in every tile."""
    queue = ClassQueue(centres, embedding, Softmax(Margin(), tile=tile), 0)
    queue.labels_S.copy_(torch.arange(centres))
    x_BD, own_BD = torch.randn(faces, embedding, requires_grad=True), F.normalize(torch.randn(faces, embedding))
    with Counting() as counting:
        queue(x_BD, own_BD, torch.arange(faces) * (centres // faces)).backward()
    return counting.work


def test_the_softmax_against_fixed_centres_does_what_was_counted():
    faces, centres, embedding, tiles = 64, 2048, 16, 4
    real = real_centres(faces, centres, embedding, centres // tiles)
    counted = centre_work(faces, centres, tiles, embedding, "float32", on_card=False)
    assert sum_of(counted, "flops") == sum_of(real, "flops") == 2 * 2 * faces * centres * embedding
    logits = 4 * faces * centres // tiles
    assert sweeps_of(counted, logits) == sweeps_of(real, logits)
    of_a_tile = sum(real_centres(faces, centres, embedding, centres // tiles // 2).values()) - sum(real.values())
    assert sum(counted.values()) == pytest.approx(of_a_tile, rel=0.15)
    assert sum_of(counted, "bytes") == pytest.approx(sum_of(real, "bytes"), rel=0.15)


def test_logits_stay_off_memory_on_a_card():
    """There the head's traffic is a few reads and writes of half numbers for each logit, here many of float32."""
    config = load_config("bigface_r50", ["train.global_batch=4096"])
    ranks, logits = Ranks(0, 8), 4096 * 125_000
    here = head_work(config, 1_000_000, ranks, "bfloat16", CPU)
    there = head_work(config, 1_000_000, ranks, "bfloat16", CARD)
    assert sum_of(here, "flops") == pytest.approx(sum_of(there, "flops"), rel=1e-3)
    assert sum_of(there, "flops") == pytest.approx(8 * logits * 512, rel=1e-3)
    assert sum_of(here, "bytes") > 90 * logits
    assert sum_of(there, "bytes") < 20 * logits


def test_the_head_follows_the_method_the_ranks_and_the_micro_batches():
    flops = lambda recipe, ranks=1, *given: sum_of(  # noqa: E731
        head_work(load_config(recipe, list(given)), 100_000, Ranks(0, ranks), "bfloat16", CARD), "flops"
    )
    batch = ("train.global_batch=384",)
    whole = flops("bigface_r50", 1, *batch)
    assert whole == pytest.approx(8 * 384 * 100_000 * 512, rel=1e-3)
    assert flops("bigface_r50", 4, *batch) == pytest.approx(whole / 4, rel=1e-3)
    assert flops("bigface_r50", 1, *batch, "train.accumulate=4") == pytest.approx(whole, rel=1e-3)
    assert flops("bigface_r50", 1, *batch, "method.sample_rate=0.1") == pytest.approx(whole / 10, rel=1e-3)
    assert flops("bigface_r50", 1, *batch, "method.subcentres=3") == pytest.approx(3 * whole, rel=1e-3)
    slots = load_config("attfc_r50").method.centres(100_000, 384)
    assert flops("attfc_r50", 4) == pytest.approx(4 * 384 / 4 * slots * 512, rel=1e-3)
    assert flops("debug_f2c", 2) == pytest.approx(2 * 4 * 1.5 * 16 * 80 * 32, rel=0.05)
    assert flops("debug_quantface") == 0
    assert sum_of(pair_work(load_config("debug_quantface")), "flops") == 4 * 2 * 32**2 * 32
    assert not pair_work(load_config("debug_quantface", ["method.loss={kind='mse'}"]))


def test_the_update_sweeps_over_all_weights():
    """SGD by hand: a read for the norm, two accesses to clip, five to move; a tenth of the matrix for Partial FC."""
    numbers, rows = backbone_size(load_config("bigface_r50").net).numbers, 4 * 1000 * 512
    swept = lambda *given, device=CARD: sum_of(  # noqa: E731
        update_work(load_config("bigface_r50", list(given)), 1000, Ranks(), device), "bytes"
    )
    plain = swept()
    assert plain == pytest.approx(4 * numbers * 8 + rows * 6, rel=1e-5)
    assert swept("train.ema=0.9") - plain == pytest.approx(4 * numbers * 3, rel=1e-5)
    assert swept("optim.clip=none") - plain == pytest.approx(-4 * numbers * 2, rel=1e-5)
    assert swept("method.update=fused") - plain == pytest.approx(-rows * 6, rel=1e-5)
    assert swept("method.sample_rate=0.1") - plain == pytest.approx(rows * (1.3 - 6), rel=1e-5)
    assert swept("optim={kind='adamw', head={lr=0.1}}") - plain == pytest.approx(4 * numbers * 2, rel=1e-5)
    assert swept(device=CPU) - plain == pytest.approx(6 * (4 * numbers + rows), rel=1e-5)
    muon = update_work(load_config("bigface_r50", ["optim=muon"]), 1000, Ranks(), CARD)
    shapes = [shape for shape in backbone_size(load_config("bigface_r50").net).shapes if len(shape) > 1]
    by_hand = 0
    for first, *others in shapes:
        short, long = sorted((first, torch.Size(others).numel()))
        by_hand += 5 * 2 * (2 * short**2 * long + short**3)
    assert sum_of(muon, "flops") == by_hand


def test_a_backbone_has_the_size_of_the_net_that_is_built():
    net = NETS["depth 34"][0]
    module = build_net(net)
    size = backbone_size(net)
    assert size.numbers == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert size.fixed_bytes + 4 * size.numbers == sum(x.nbytes for x in (*module.parameters(), *module.buffers()))
    assert [bytes_of(name) for name in ("float32", "bfloat16", "float16")] == [4, 2, 2]
