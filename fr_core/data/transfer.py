"""Copies the images of batches to a card, beside the step before."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

import torch

from fr_core.data.stream import Batch


def on_card(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """Yield batches with their images on the device; labels stay on the host, where some methods read them.

    On a card the copies have a queue of their own. The host comes for a batch while the card still computes the step
    before, so the copy runs beside that step. Closing closes the given batches, too.
    """
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    with closing(batches):
        for batch in batches:
            with torch.cuda.stream(copies):
                there = _there(batch, device)
            computes = torch.cuda.current_stream(device)
            computes.wait_stream(copies)
            for part in filter(None, (there, there.unlabelled)):
                part.images_BHWC.record_stream(computes)  # so that the memory is not taken for the next batch too early
                part.class_images_BKHWC.record_stream(computes)
            yield there


def _there(batch: Batch, device: torch.device) -> Batch:
    return replace(
        batch,
        images_BHWC=batch.images_BHWC.to(device, non_blocking=True),
        class_images_BKHWC=batch.class_images_BKHWC.to(device, non_blocking=True),
        unlabelled=batch.unlabelled and _there(batch.unlabelled, device),
    )
