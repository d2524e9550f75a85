"""The interface that all backbones share. Legend: B batch, H W pixels, D embedding."""

from typing import ClassVar

from torch import nn


class Backbone(nn.Module):
    """A net from normalised pixels [B, 3, H, W] to embeddings float32 [B, D], which are not L2-normalised."""

    input_size: int  # side of the square input, pixels
    input_std: float  # x = (pixel − 127.5) / input_std
    embedding: int  # D
    in_integers: ClassVar[bool] = False  # True: the forward pass simulates integers (fr_core/nets/quantised.py)

    @property
    def last_norm(self) -> nn.Module | None:
        """Return the batch norm that the embeddings come out of, or None for a net without one."""
        return None
