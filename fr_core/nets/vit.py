"""A vision transformer for faces (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021), in insightface's form.

Each patch of the image becomes a token with a learned position. Blocks of attention and of two linear layers mix the
tokens. There is no class token: two linear layers, each with a batch norm behind it, make the embedding of all tokens.
docs/vit.md lists the published sizes, and where this page departs from the published code.

Legend: B batch, C channels of the image, then of a token, H W pixels, T tokens, D embedding. N blocks, K tokens that
training keeps. N2B11 has an entry for each block, branch and image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fr_core.nets.backbone import Backbone
from fr_core.nets.iresnet import Stage

EPS = 2e-5  # ε of the two batch norms
STD = 0.02  # of the initial linear layers, positions and mask token


class Block(nn.Module):
    """Transformer block: the tokens plus attention over them, then plus two linear layers. A norm begins each branch.

    Args:
        width: Channels of a token.
        heads: Heads of the attention; they share the channels.
        inside: Channels between the two linear layers.
    """

    def __init__(self, width: int, heads: int, inside: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inside)
        self.fc2 = nn.Linear(inside, width)

    def forward(self, x_BTC: Tensor, share_2B11: Tensor | None = None) -> Tensor:
        """Map tokens [B, T, C] to tokens. ``share_2B11`` multiplies both branches of each image; None: 1."""
        if share_2B11 is None:
            x_BTC = x_BTC + self.attend(x_BTC)
            return x_BTC + self.transform(x_BTC)
        x_BTC = x_BTC + share_2B11[0] * self.attend(x_BTC)
        return x_BTC + share_2B11[1] * self.transform(x_BTC)

    def attend(self, x_BTC: Tensor) -> Tensor:
        """Return softmax(Q·Kᵀ / √channels of a head)·V of all heads, mixed by a linear layer."""
        heads = self.qkv(self.norm1(x_BTC)).unflatten(2, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def transform(self, x_BTC: Tensor) -> Tensor:
        """Return what two linear layers with a ReLU6 between them make of each token."""
        return self.fc2(F.relu6(self.fc1(self.norm2(x_BTC))))


class Tower(Stage):
    """Blocks in a row, with stochastic depth (Huang et al., "Deep Networks with Stochastic Depth", 2016).

    In training, an image skips each branch with a probability that grows from 0 in the first block to ``drop_path`` in
    the last. Its other branches grow by 1 / (1 − probability). All choices are drawn before the first block: in one
    launch, and a recomputed block needs no random numbers.
    """

    drop_path: float = 0.0

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Run the blocks, with checkpointed segments if ``recompute_blocks`` is set."""
        shares: Sequence[Tensor | None] = [None] * len(self)
        if self.training and self.drop_path:
            shares = self.draw(x_BTC).unbind()
        if self.recompute_blocks is None:
            return run(list(self), shares, x_BTC)
        for start in range(0, len(self), self.recompute_blocks):
            part = slice(start, start + self.recompute_blocks)
            given = (list(self)[part], shares[part], x_BTC)
            x_BTC = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)
        return x_BTC

    def draw(self, x_BTC: Tensor) -> Tensor:
        """Draw what multiplies the branches: 0, or 1 / (1 − probability). [N, 2, B, 1, 1]."""
        kept_N1111 = 1 - torch.linspace(0, self.drop_path, len(self), device=x_BTC.device).view(-1, 1, 1, 1, 1)
        random_N2B11 = torch.rand(len(self), 2, len(x_BTC), 1, 1, device=x_BTC.device)
        return (random_N2B11 < kept_N1111) / kept_N1111


def run(blocks: Sequence[nn.Module], shares: Sequence[Tensor | None], x_BTC: Tensor) -> Tensor:
    """Run blocks one after the other, each with its shares."""
    for block, share_2B11 in zip(blocks, shares, strict=True):
        x_BTC = block(x_BTC, share_2B11)
    return x_BTC


class ViT(Backbone):
    """Vision transformer from normalised pixels to embeddings.

    Args:
        depth: N.
        width: Channels of a token.
        heads: Heads of the attention.
        patch: Side of a patch, pixels. Rows and columns that fill no patch are left out.
        mlp_ratio: Channels between the two linear layers of a block, for each channel of a token.
        drop_path: Probability that training skips a branch of the last block.
        mask: Share of the patches that training leaves out. A learned token takes their place behind the blocks.
        input_size: Side of the square input, pixels.
        embedding: D.
    """

    def __init__(
        self,
        depth: int = 12,
        width: int = 512,
        heads: int = 8,
        patch: int = 9,
        mlp_ratio: int = 4,
        drop_path: float = 0.05,
        mask: float = 0.0,
        input_size: int = 112,
        embedding: int = 512,
    ) -> None:
        super().__init__()
        self.input_size, self.embedding, self.mask = input_size, embedding, mask
        self.tokens = (input_size // patch) ** 2
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(torch.empty(self.tokens * width))  # a vector: no optimiser decays it
        self.mask_token = nn.Parameter(STD * torch.randn(width)) if mask else None
        self.tower = Tower(*(Block(width, heads, mlp_ratio * width) for _ in range(depth)))
        self.tower.drop_path = drop_path
        self.norm = nn.LayerNorm(width)
        self.reduce = nn.Linear(self.tokens * width, width, bias=False)
        self.bn = nn.BatchNorm1d(width, eps=EPS)
        self.fc = nn.Linear(width, embedding, bias=False)
        self.features = nn.BatchNorm1d(embedding, eps=EPS)
        nn.init.normal_(self.positions, std=STD)  # published truncated at ± 2, which is 100 standard deviations
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks."""
        return list(self.tower)

    @property
    def last_norm(self) -> nn.Module:
        """Return the batch norm that the embeddings come out of."""
        return self.features

    def stop_dropout(self) -> None:
        """Skip no branch and mask no patch any more, in training mode either."""
        self.tower.drop_path, self.mask = 0.0, 0.0

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map normalised pixels [B, 3, H, W] to embeddings float32 [B, D], not L2-normalised.

        Everything behind the blocks runs in float32 under autocast too: cosines need the precision.
        """
        x_BTC = self.patches(x_BCHW).flatten(2).transpose(1, 2)
        x_BTC = x_BTC + self.positions.view(self.tokens, -1)
        seen_BKC = self.draw(x_BTC) if self.training and self.mask else None
        x = self.tower(x_BTC if seen_BKC is None else x_BTC.gather(1, seen_BKC))
        with torch.autocast(x.device.type, enabled=False):
            x = self.norm(x.float())
            if seen_BKC is not None and self.mask_token is not None:
                x = self.mask_token.expand(x_BTC.shape).scatter(1, seen_BKC, x)
            return self.features(self.fc(self.bn(self.reduce(x.flatten(1)))))

    def draw(self, x_BTC: Tensor) -> Tensor:
        """Draw the tokens that each image keeps: their places, as an index [B, K, C]."""
        order_BT = torch.rand(x_BTC.shape[:2], device=x_BTC.device).argsort(1)
        return order_BT[:, : int(self.tokens * (1 - self.mask)), None].expand(-1, -1, x_BTC.shape[2])
