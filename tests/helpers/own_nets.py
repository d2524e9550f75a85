"""A module of somebody's own nets, whose import leaves a trace."""

import sys
from pathlib import Path

CALL = "somebodys_nets:make"
CODE = '''
from pathlib import Path

import torch
from torch import nn

Path(__file__).with_name("imported").touch()


class Net(nn.Module):
    """It repeats a block of linear layers; ``.item()`` asks for a number, as some nets do while they are made."""

    def __init__(self, width, embedding):
        super().__init__()
        rates = [rate.item() for rate in torch.linspace(0, 0.1, 2)]
        self.conv = nn.Conv2d(3, width, 4, 4, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks = [nn.Sequential(nn.Conv2d(width, width, 1), nn.SiLU(), nn.Dropout(rate)) for rate in rates]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, embedding)
        self.last_norm = nn.BatchNorm1d(embedding)

    def forward(self, images):
        return self.last_norm(self.fc(self.blocks(self.norm(self.conv(images))).mean((2, 3))))


def make(width=8, embedding=32):
    return Net(width, embedding)


class Attention(nn.Module):
    """It has a layer that returns two tensors."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.attention = nn.MultiheadAttention(32, 1, batch_first=True)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        return self.attention(tokens, tokens, tokens)[0].mean(1)


def attention():
    return Attention()


def maps(**arguments):
    return nn.Conv2d(3, 32, 4)


def pairs():
    class Pair(nn.Module):
        def forward(self, images):
            return images, images

    return Pair()


def nothing():
    return None
'''


def write_module(folder: Path) -> None:
    """Write the module ``somebodys_nets``."""
    (folder / "somebodys_nets.py").write_text(CODE)


def forget(folder: Path) -> None:
    """Make as if the module had never been imported."""
    sys.modules.pop("somebodys_nets", None)
    (folder / "imported").unlink(missing_ok=True)


def was_imported(folder: Path) -> bool:
    """Tell whether the module was imported since it was forgotten."""
    return (folder / "imported").exists() or "somebodys_nets" in sys.modules
