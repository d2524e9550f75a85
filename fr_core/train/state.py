"""The state of a run: what it carries from step to step."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fr_core.data.plan import Plan
from fr_core.heads.head import Head
from fr_core.losses.ekd import Agreement
from fr_core.nets.backbone import Backbone
from fr_core.optim.fastface import FastFaceWatcher
from fr_core.train.distill import Teacher
from fr_core.train.notice import Notice
from fr_core.train.reading import Reading
from fr_core.undo import Undo


@dataclass
class TrainState:
    """Everything that training changes, and the plan that training follows."""

    plan: Plan
    device: torch.device
    backbone: Backbone  # without its data-parallel wrapper
    parallel: nn.Module  # the backbone as training calls it: wrapped if there are several ranks
    head: Head | None  # represents the classes; None if the method compares pairs alone
    optimizers: dict[str, torch.optim.Optimizer]  # "backbone", and "head" if the head has parameters
    total_steps: int
    average: Backbone | None = None  # moving average of the backbone
    encoder: Backbone | None = None  # momentum encoder: AttFC's class encoder, DCQ's key encoder, F2C's gallery net
    ships_encoder: bool = False  # verify and ship the momentum encoder, not the backbone
    teacher: Teacher | None = None
    adapter: nn.Linear | None = None  # maps to the teacher's width; trained with the backbone, not shipped
    agreement: Agreement | None = None  # the loss between the pairs of a student and of its teacher
    watcher: FastFaceWatcher | None = None  # FastFace: cuts the learning rate
    began: float = field(default_factory=time.monotonic)  # monotonic start in seconds, as if the run had never paused
    step: int = 0  # optimiser steps done
    frozen: frozenset[str] = frozenset()  # names of the backbone's modules that stay in eval mode
    head_steps: int = 0  # first steps, which train the head alone
    loss_scale: float = 1.0
    good_steps: int = 0  # finite steps since the loss scale changed
    bad_steps: int = 0  # non-finite steps in a row
    dropped_steps: int = 0  # non-finite steps of the whole run
    run_id: str | None = None  # id of the MLflow run
    undo: Undo = field(default_factory=Undo)  # buffers as they were before this step
    unread: list[Reading] = field(default_factory=list)  # steps of which the host has drawn no conclusions yet
    asked: Notice = Notice.NONE  # notice to this rank, for the next step to tell all ranks
    notice: Notice = Notice.NONE  # strongest notice that all ranks know of and have not followed yet

    @property
    def trained(self) -> dict[str, Tensor]:
        """Return the tensors that the backbone's optimiser moves, by name."""
        adapter = {"adapter.weight": self.adapter.weight} if self.adapter else {}
        return {name: p for name, p in self.backbone.named_parameters() if p.requires_grad} | adapter

    @property
    def head_only(self) -> bool:
        """Return whether the next step trains the head alone."""
        return self.step < self.head_steps

    def has_moved(self, module: str) -> bool:
        """Return whether training may have moved a module of the backbone by now, by its name."""
        return self.step > self.head_steps and module not in self.frozen

    @property
    def usable(self) -> Backbone:
        """Return the net to verify and ship: DCQ's key encoder, else the moving average if kept, else the backbone."""
        if self.encoder is not None and self.ships_encoder:
            return self.encoder
        return self.average if self.average is not None else self.backbone
