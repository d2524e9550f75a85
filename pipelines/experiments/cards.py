"""Figures of cards, by which ``bigface plan --gpu KIND`` predicts the time of a step (docs/cards.md)."""

from dataclasses import dataclass, replace

from fr_core.errors import UserError
from fr_core.train.work import Operator

# Shares of a data sheet's figures that real operators reach. They are assumed: no card was measured here.
CONVOLUTION = 0.4  # 3×3 convolutions of 64 to 512 channels on maps of 112 to 7 pixels, channels-last
PRODUCT = 0.6  # products of matrices with thousands of rows, at the clock that a card holds
FLOAT32 = 0.8  # float32 arithmetic without tensor cores
MEMORY = 0.8  # sweeps over tensors of megabytes
LINK, NETWORK = 0.7, 0.8  # NCCL's rings within a node, and between nodes
LAUNCH = 5e-6  # seconds from one operator to the next, where the host is what they wait for
HOP = 10e-6  # seconds that a collective takes for each doubling of the ranks, whatever it carries
GB = 1e9


@dataclass(frozen=True)
class Card:
    """A card by its maker's figures: dense, without sparsity, and one way where a link has two.

    Args:
        name: the card's name.
        source: where its maker states the figures.
        half: TFLOP/s of products in bfloat16 or float16 with float32 sums.
        tf32: TFLOP/s of products in TF32; cards without TF32 take float32's.
        float32: TFLOP/s in float32 without tensor cores.
        memory: TB/s of its memory.
        gib: memory that its driver reports, GiB.
        link: GB/s to the other cards of a node.
        bfloat16: whether it multiplies bfloat16.
    """

    name: str
    source: str
    half: float
    tf32: float
    float32: float
    memory: float
    gib: float
    link: float
    bfloat16: bool = True


VOLTA, TURING = "NVIDIA V100 data sheet, 2020", "NVIDIA T4 data sheet, 2019"
GA102, ADA = "NVIDIA Ampere GA102 whitepaper, 2021", "NVIDIA Ada whitepaper, 2022"
AMPERE, A10G = "NVIDIA A100 data sheet, 2021", "NVIDIA A10G data sheet for AWS, 2022"
CARDS = {
    "t4": Card("T4", TURING, 65, 8.1, 8.1, 0.32, 15, 16, False),
    "v100-16": Card("V100 SXM2 16 GB", VOLTA, 125, 15.7, 15.7, 0.9, 15.7, 150, False),
    "v100-32": Card("V100 SXM2 32 GB", VOLTA, 125, 15.7, 15.7, 0.9, 31.7, 150, False),
    "rtx3090": Card("RTX 3090", GA102, 71, 35.6, 35.6, 0.936, 23.6, 32),
    "a10g": Card("A10G", A10G, 70, 35, 35, 0.6, 22.4, 32),
    "a100-40": Card("A100 SXM 40 GB", AMPERE, 312, 156, 19.5, 1.555, 39.5, 300),
    "a100-80": Card("A100 SXM 80 GB", AMPERE, 312, 156, 19.5, 2.039, 79.2, 300),
    "l4": Card("L4", "NVIDIA L4 data sheet, 2023", 121, 60, 30.3, 0.3, 22.4, 32),
    "l40s": Card("L40S", "NVIDIA L40S data sheet, 2023", 362, 183, 91.6, 0.864, 44.5, 32),
    "rtx4090": Card("RTX 4090", ADA, 165.2, 82.6, 82.6, 1.008, 23.6, 32),
    "h100": Card("H100 SXM", "NVIDIA H100 data sheet, 2023", 989, 494, 67, 3.35, 79.1, 450),
    "h200": Card("H200 SXM", "NVIDIA H200 data sheet, 2024", 989, 494, 67, 4.8, 139, 450),
}


@dataclass(frozen=True)
class Rates:
    """Speeds of one rank, as assumed of a card or as measured. FLOP/s, bytes a second, and seconds.

    Args:
        convolution, product: FLOP/s by precision.
        sweep: bytes a second of sweeps over feature maps, weights and logits. A CPU holds some of them in its cache.
        launch: seconds that an operator takes at least.
        ring: bytes a second that a rank sends and receives in a collective.
        hop: seconds that a collective takes for each doubling of the ranks.
        overlaps: whether the sum of gradients runs beside the backward pass.
    """

    convolution: dict[str, float]
    product: dict[str, float]
    sweep: dict[str, float]
    launch: float
    ring: float
    hop: float
    overlaps: bool

    def seconds(self, operator: Operator) -> float:
        """Return the seconds of an operator: of its arithmetic, its memory traffic or its launch."""
        if not operator.flops:
            return max(operator.bytes / self.sweep[operator.kind], self.launch)
        speed = (self.convolution if operator.kind == "convolution" else self.product)[operator.precision]
        return max(operator.flops / speed, operator.bytes / self.sweep["maps"], self.launch)


def card_of(kind: str) -> Card:
    """Return a card by its short name.

    Raises:
        UserError: the name is unknown; it lists those that are known.
    """
    if kind not in CARDS:
        raise UserError(f"--gpu {kind}: no such card: give one of {', '.join(CARDS)}")
    return CARDS[kind]


def rates_of(card: Card, workers: int, per_node: int, network: float, tf32: bool = True) -> Rates:
    """Return the speeds of one of several workers, each with a card.

    Args:
        workers: number of workers.
        per_node: cards of a node.
        network: GB/s of a node's network, one way.
        tf32: whether convolutions of float32 numbers may use TF32.
    """
    half = {"bfloat16": card.half, "float16": card.half}
    convolution = {name: 1e12 * CONVOLUTION * speed for name, speed in half.items()}
    whole = 1e12 * FLOAT32 * card.float32
    convolution["float32"] = max(1e12 * CONVOLUTION * card.tf32, whole) if tf32 else whole
    product = {name: 1e12 * PRODUCT * speed for name, speed in half.items()} | {
        "float32": 1e12 * FLOAT32 * card.float32
    }
    memory, ring = 1e12 * MEMORY * card.memory, GB * LINK * card.link
    sweep = {"maps": memory, "weights": memory, "logits": memory}
    rates = Rates(convolution, product, sweep, LAUNCH, ring, HOP, True)
    return rates if workers <= per_node else replace(rates, ring=min(ring, GB * NETWORK * network))
