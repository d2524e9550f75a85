"""The interface that all backbones share. Legend: B batch, H W pixels, D embedding."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn


class Backbone(nn.Module):
    """A net from normalised pixels [B, 3, H, W] to embeddings float32 [B, D], which are not L2-normalised."""

    input_size: int  # side of the square input, pixels
    input_mean: float = 127.5  # x = (pixel − input_mean) / input_std, in RGB
    input_std: float = 127.5
    embedding: int  # D
    in_integers: ClassVar[bool] = False  # True: the forward pass simulates integers (fr_core/nets/quantised.py)

    def blocks(self) -> Sequence[nn.Module]:
        """Return the blocks that the net repeats, in order. They are compiled one by one; equal shapes share code.

        Layer-wise rates count them (``fr_core/nets/finetune.py``). For these, a net names its layers from pixels to
        embedding.
        """
        return []

    @property
    def last_norm(self) -> nn.Module | None:
        """Return the batch norm that the embeddings come out of, or None for a net without one."""
        return None

    def stop_dropout(self) -> None:
        """Leave nothing out at random any more, in training mode either: for an encoder that only embeds."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


def normalised(images_BHWC: Tensor, net: Backbone) -> Tensor:
    """Return uint8 RGB [B, H, W, 3] as a net takes it: float32 [B, 3, H, W], channels-last."""
    return images_BHWC.permute(0, 3, 1, 2).float().sub_(net.input_mean).div_(net.input_std)
