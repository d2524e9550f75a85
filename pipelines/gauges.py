"""A run's figures as Ray metrics, which every node exports to Prometheus as ``ray_bigface_…``."""

from collections.abc import Mapping

DESCRIPTIONS = {
    "step": "Optimiser steps taken.",
    "loss": "The method's loss.",
    "lr": "Learning rate of the backbone.",
    "images_per_second": "Images trained on, over all ranks.",
    "data_wait": "Share of the time spent waiting for data.",
    "head_mib": "Memory of this rank's class centres, MiB.",
    "restarts": "Times that the run was started again; rank 0 alone.",
    "undelivered": "Rows and files that MLflow does not have yet; rank 0 alone.",
}


class Gauges:
    """The gauges of one rank, tagged with the rank and the run."""

    def __init__(self, run: str, rank: int) -> None:
        from ray.util.metrics import Gauge

        self.gauges = {
            name: Gauge(f"bigface_{name}", description, tag_keys=("run", "rank"))
            for name, description in DESCRIPTIONS.items()
        }
        for gauge in self.gauges.values():
            gauge.set_default_tags({"run": run, "rank": str(rank)})

    def set(self, metrics: Mapping[str, float]) -> None:
        """Set the gauges that ``metrics`` has figures for."""
        for name, gauge in self.gauges.items():
            if name in metrics:
                gauge.set(metrics[name])
