"""A run's figures as Ray metrics: ``ray_bigface_…`` in the Prometheus export of every node."""

from collections.abc import Mapping

DESCRIPTIONS = {
    "step": "Optimiser steps done.",
    "loss": "The method's loss.",
    "lr": "Learning rate of the backbone.",
    "images_per_second": "Images trained on, over all ranks.",
    "data_wait": "Share of the time spent waiting for data.",
    "head_mib": "Memory of this rank's class centres, MiB.",
}


class Gauges:
    """Those of one rank, tagged with it and with its run."""

    def __init__(self, run: str, rank: int) -> None:
        from ray.util.metrics import Gauge

        self.gauges = {
            name: Gauge(f"bigface_{name}", description, tag_keys=("run", "rank"))
            for name, description in DESCRIPTIONS.items()
        }
        for gauge in self.gauges.values():
            gauge.set_default_tags({"run": run, "rank": str(rank)})

    def set(self, metrics: Mapping[str, float]) -> None:
        for name, gauge in self.gauges.items():
            if name in metrics:
                gauge.set(metrics[name])
