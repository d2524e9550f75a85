"""bigface's library. Start with ``fr_core.open_net(ref).embed(images)``."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fr_core.nets.open import open_net as open_net

__all__ = ["open_net"]


def __getattr__(name: str) -> object:
    """Import PyTorch only when a net is opened."""
    if name == "open_net":
        from fr_core.nets.open import open_net

        return open_net
    raise AttributeError(f"module 'fr_core' has no attribute {name!r}")
