"""What every backbone is, whatever its layers. Legend: B batch, H W pixels, D embedding."""

from typing import ClassVar

from torch import nn


class Backbone(nn.Module):
    """Maps normalised pixels [B, 3, H, W] to embeddings float32 [B, D], which are not L2-normalised."""

    input_size: int  # side of the square input, pixels
    input_std: float  # x = (pixel − 127.5) / input_std
    embedding: int  # D
    in_integers: ClassVar[bool] = False  # its forward pass simulates integers (fr_core/nets/quantised.py)

    @property
    def last_norm(self) -> nn.Module | None:
        """The batch norm that the embeddings come from; None: there is none."""
        return None
