"""The teacher of a distilled run: a net that sees the student's images, or embeddings that were computed before.

A net is a consistent teacher: it sees the same augmented images as the student. See Beyer et al., "Knowledge
distillation: a good teacher is patient and consistent", CVPR 2022. Stored embeddings are those of the plain images, but
cost no forward pass.

Legend: A micro-batches, B labelled and U unlabelled images of a rank's step, X = (B + U) / A, E teacher's embedding.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fr_core.config import Config, distillation
from fr_core.data.embeddings import EmbeddingsById, by_id, open_embeddings
from fr_core.data.schema import Dataset, open_dataset
from fr_core.data.stream import Batch
from fr_core.device import from_host
from fr_core.errors import UserError
from fr_core.nets.backbone import Backbone, normalised
from fr_core.nets.names import option_named
from fr_core.nets.onnx_net import OnnxNet
from fr_core.nets.open import open_net


@dataclass(frozen=True)
class Teacher:
    """A net, or stored embeddings of the labelled images, and of the unlabelled images if there are any."""

    embedding: int  # E
    net: Backbone | OnnxNet | None = None
    labelled: EmbeddingsById | None = None
    unlabelled: EmbeddingsById | None = None

    @torch.no_grad()
    def targets(self, batch: Batch, images_AXHWC: list[Tensor]) -> list[Tensor]:
        """Return the teacher's embeddings of each micro-batch of :func:`micro_batches`: [X, E], not normalised."""
        if self.net is not None:
            net = self.net
            return [net(normalised(resized(images_XHWC, net.input_size), net)) for images_XHWC in images_AXHWC]
        assert self.labelled is not None
        known_BE, more_UE = torch.from_numpy(self.labelled(batch.sample_ids)), None
        if self.unlabelled is not None and batch.unlabelled is not None:
            more_UE = torch.from_numpy(self.unlabelled(batch.unlabelled.sample_ids))
        device = images_AXHWC[0].device
        return [from_host(known, device) for known in _split_parts(known_BE, more_UE, len(images_AXHWC))]


def open_teacher(config: Config, dataset: Dataset, device: torch.device) -> Teacher | None:
    """Open the teacher of a run on ``dataset``; return None if the method takes none.

    Raises:
        UserError: no teacher is named, it does not open, or its embeddings are of other images. Or its width differs
            from the student's, and the loss needs equal widths.
    """
    given = config.method.taught
    if given is None:
        return None
    distill = distillation(config)
    if given.teacher:
        with option_named(f"{given.named}_net="):
            net = open_net(given.teacher, given.teacher_net, device, trust_code=config.train.trust_code).net
        teacher = Teacher(net.embedding, net)
    elif distill and distill.embeddings:
        known, other = by_id(open_embeddings(Path(distill.embeddings)), dataset), None
        if distill.unlabelled and distill.unlabelled.embeddings:
            other = by_id(open_embeddings(Path(distill.unlabelled.embeddings)), open_dataset(distill.unlabelled.path))
        teacher = Teacher(known.embeddings_ID.shape[1], None, known, other)
    else:
        embeddings = f" or {given.embeddings_named}=FOLDER" if given.embeddings_named else ""
        raise UserError(f"no teacher is named: give {given.named}=RUN{embeddings}")
    if teacher.unlabelled and teacher.unlabelled.embeddings_ID.shape[1] != teacher.embedding:
        raise UserError(
            f"method.distill.unlabelled.embeddings have {teacher.unlabelled.embeddings_ID.shape[1]} dimensions, "
            f"method.distill.embeddings {teacher.embedding}: give embeddings of one teacher"
        )
    if teacher.embedding != config.net.embedding and given.width_mend:
        raise UserError(
            f"the teacher's embedding has {teacher.embedding} dimensions, the student's {config.net.embedding}: "
            f"give net.embedding={teacher.embedding}, or {given.width_mend}"
        )
    return teacher


def micro_batches(batch: Batch, count: int) -> list[Tensor]:
    """Split a rank's images into equal parts, labelled images first in each: A tensors uint8 [X, H, W, 3]."""
    others_UHWC = None
    if batch.unlabelled is not None:
        others_UHWC = resized(batch.unlabelled.images_BHWC, batch.images_BHWC.shape[1])
    return _split_parts(batch.images_BHWC, others_UHWC, count)


def resized(images_XHWC: Tensor, size: int) -> Tensor:
    """Resize images to uint8 [X, size, size, 3]."""
    if images_XHWC.shape[1] == size:
        return images_XHWC
    images_XCHW = images_XHWC.permute(0, 3, 1, 2).float()
    images_XCHW = F.interpolate(images_XCHW, (size, size), mode="bilinear", antialias=True)
    return images_XCHW.round_().to(torch.uint8).permute(0, 2, 3, 1)


def _split_parts(labelled: Tensor, unlabelled: Tensor | None, count: int) -> list[Tensor]:
    parts = labelled.chunk(count)
    if unlabelled is None:
        return list(parts)
    return [torch.cat(pair) for pair in zip(parts, unlabelled.chunk(count), strict=True)]
