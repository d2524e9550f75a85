"""What verifications measured of a run's net: the threshold that decides whether two faces show one person.

``bigface verify RUN`` adds an entry to ``verification.json`` in the run's folder. A training with ``verify.pairs``
leaves the same facts in ``report.json``. Whoever needs a threshold takes the newest of them.
"""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fr_core.data.store import AnyPath, explain_disk_errors, write_text_atomically
from fr_core.nets.checkpoint_files import BACKBONE, find_checkpoint, read_summary

VERIFICATIONS = "verification.json"
NEAR = 0.05  # cosines this near a threshold count as uncertain where nobody measured how far the doubt reaches


class Verified(BaseModel):
    """One verification of one checkpoint on one list of pairs."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    threshold: float  # cosine from which two faces count as one person
    accuracy: float | None = None  # share of right decisions, in [0, 1]
    accuracy_low: float | None = None  # ends of its 95 % interval
    accuracy_high: float | None = None
    pairs_file: str | None = None  # the list of pairs
    pairs: int | None = None  # scored
    people: int | None = None  # in these pairs; None where the list does not tell
    uncertain_within: float = NEAR  # cosines this near the threshold are often decided wrongly
    step: int | None = None  # of the checkpoint
    weights: str | None = None  # SHA-256 of the checkpoint's backbone file
    figures: dict[str, float] = {}  # all that the verification measured


def run_folder(ref: AnyPath) -> AnyPath | None:
    """Return the run that a run's or a checkpoint's folder belongs to, or None if ``ref`` is no folder."""
    folder = ref.resolve()
    if not folder.is_dir():
        return None
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def add_verification(checkpoint: AnyPath, verified: Verified) -> AnyPath | None:
    """Store a verification as the newest of the run; it replaces an older one of the same weights and list.

    Args:
        checkpoint: folder of the checkpoint that was verified; its step and checksum are added.

    Returns:
        The file, or None if the checkpoint lies in no run's folder.

    Raises:
        UserError: the file cannot be written.
    """
    run = run_folder(checkpoint)
    if run is None or run == checkpoint.resolve():
        return None
    verified = verified.model_copy(update=_identity(checkpoint))
    key = (verified.pairs_file, verified.weights)
    kept = [other for other in read_verifications(run) if (other.pairs_file, other.weights) != key]
    entries = [entry.model_dump(exclude_none=True) for entry in [*kept, verified]]
    path = run / VERIFICATIONS
    with explain_disk_errors(path):
        write_text_atomically(path, json.dumps({"verifications": entries}, indent=1) + "\n")
    return path


def read_verifications(run: AnyPath) -> list[Verified]:
    """Read the entries of a run's ``verification.json``, newest last; none if it is missing or damaged."""
    try:
        entries = json.loads((run / VERIFICATIONS).read_text())["verifications"]
        return [Verified.model_validate(entry) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return []


def newest_verification(run: AnyPath) -> Verified | None:
    """Return the newest verification of a run's last verified step, by the training or by ``bigface verify``."""
    known = [*_of_training(run), *read_verifications(run)]
    return max(enumerate(known), key=_age, default=(0, None))[1]


def verification_of(checkpoint: AnyPath) -> tuple[Verified | None, bool]:
    """Return the newest verification that tells about a checkpoint, and whether it measured these very weights.

    Where none did, it is the newest of the checkpoint's run.
    """
    run = run_folder(checkpoint)
    if run is None:
        return None, False
    identity = _identity(find_checkpoint(checkpoint))
    known = [*_of_training(run), *read_verifications(run)]
    same = [one for one in known if _measured(one, identity)]
    return (same[-1], True) if same else (newest_verification(run), False)


def _age(numbered: tuple[int, Verified]) -> tuple[int, int]:
    """Order verifications: later steps are newer, and among these later entries."""
    place, verified = numbered
    return (-1 if verified.step is None else verified.step, place)


def _measured(verified: Verified, identity: dict[str, Any]) -> bool:
    """Tell whether a verification measured a checkpoint; a training's report names only its step."""
    if verified.weights is not None:
        return verified.weights == identity["weights"]
    return verified.step == identity["step"]


def _identity(checkpoint: AnyPath) -> dict[str, Any]:
    summary = read_summary(checkpoint)
    return {"step": summary.get("step"), "weights": summary["files"].get(BACKBONE, {}).get("sha256")}


def _of_training(run: AnyPath) -> list[Verified]:
    """Read the verification at the end of a training from ``report.json``: one entry, or none."""
    try:
        report = json.loads((run / "report.json").read_text())
        figures = report["figures"]
        names = ("threshold", "accuracy", "accuracy_low", "accuracy_high", "pairs", "people")
        facts = {name: figures[name] for name in names if name in figures}
        facts["pairs_file"] = report.get("config", {}).get("verify", {}).get("pairs")
        facts["step"] = figures.get("steps")
        return [Verified.model_validate(facts | {"figures": figures})]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError):
        return []
