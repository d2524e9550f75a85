"""``bigface match``: whether two photos show the same person, how sure that is, and where the threshold comes from."""

import json
import math
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from fr_core.data.store import AnyPath, to_path
from fr_core.errors import UserError
from fr_core.nets.open import Recogniser
from fr_core.nets.verifications import NEAR, Verified, run_folder, verification_of
from fr_core.verify.suites import photo_similarity

POOR = 0.8  # accuracy below which an answer is not to be relied on
SAME, DIFFERENT = "the same person", "different people"


@dataclass(frozen=True)
class Match:
    """The comparison of two photos."""

    cosine: float
    threshold: float | None  # None: nobody measured one for this net
    source: str | None  # where the threshold comes from, in words
    cautions: list[str]  # sentences
    verified: Verified | None  # newest verification of the net, which tells how good the net is
    not_square: list[Path]  # photos whose centre was taken for the face

    @property
    def verdict(self) -> str | None:
        """Return the answer in words, or None without a threshold."""
        if self.threshold is None:
            return None
        return SAME if self.cosine >= self.threshold else DIFFERENT


def match(
    recogniser: Recogniser, a: Path, b: Path, model: str, threshold: float | None = None, align: bool = False
) -> Match:
    """Compare the faces on two photos.

    Args:
        model: what the net was opened from, to be named in words.
        threshold: cosine from which two faces are one person; None: that of the net's newest verification.
        align: find the face on each photo and align it; otherwise the photos are face crops.

    Raises:
        UserError: a threshold that is no cosine, embeddings that are not finite, or as
            :func:`fr_core.verify.suites.photo_similarity`.
    """
    if threshold is not None and not -1 <= threshold <= 1:
        raise UserError(f"--threshold {threshold:g}: a cosine lies between -1 and 1")
    cosine, not_square = photo_similarity(recogniser, a, b, align)
    if not math.isfinite(cosine):
        raise UserError(f"{model}: its embeddings of these photos are not finite, or all 0: give other weights")
    verified, same_weights = recogniser.verified, True
    if recogniser.checkpoint is not None:
        verified, same_weights = verification_of(recogniser.checkpoint)
    if threshold is not None:
        return _by_option(cosine, threshold, verified, not_square)
    if verified is None:
        return Match(cosine, None, None, [], None, not_square)
    place = "" if recogniser.checkpoint is not None else f" as stored in {model}"
    return _by_verification(cosine, verified, place, same_weights, not_square)


def threshold_advice(recogniser: Recogniser, model: str, net: str | None) -> str:
    """Return how to get a threshold for a net that has none, with the command to copy.

    Args:
        model, net: what the net was opened from.
    """
    run = recogniser.checkpoint and run_folder(recogniser.checkpoint)
    advice = f"No threshold is known for this net, so there is no verdict. Measure one: {_verify(model, net, run)}"
    return advice if run else f"{advice}, and give match the threshold that it prints as --threshold"


def verify_command(ref: str, net: str | None, config: dict[str, Any]) -> str:
    """Return the command that verifies a net; its pairs are those of the config, or those beside the training data.

    Args:
        ref, net: as :func:`fr_core.nets.open.open_net` takes them.
        config: config of the net's run; empty if there is none.
    """
    images, pairs = config.get("verify", {}).get("images"), config.get("verify", {}).get("pairs")
    beside = to_path(config.get("data", {}).get("path") or "").parent / "verify"  # where bigface split puts them
    if pairs is None and isinstance(beside, Path) and (beside / "pairs.csv").is_file():
        images, pairs = str(beside / "images"), str(beside / "pairs.csv")
    if pairs is None:
        images, pairs = "DIR", "PAIRS.csv"
    named = ["--net", net] if net else []
    below = ["--images", images] if images else []
    return shlex.join(["bigface", "verify", ref, *named, *below, "--pairs", pairs])


def _verify(model: str, net: str | None, run: AnyPath | None) -> str:
    config: dict[str, Any] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):  # bare weights, or a run without its run.json
        config = json.loads((run / "run.json").read_text())["config"] if run else {}
    return verify_command(model, net, config)


def source_in_words(verified: Verified, place: str = "") -> str:
    """Return where a threshold comes from and how good the net is there.

    Args:
        place: words on the file that stores the threshold, such as ``" as stored in net.onnx"``.

    Example:
        threshold 0.312 from 6,000 pairs of 20 people (verify/pairs.csv), where this net is right in 91.2 ± 2.1 %
    """
    if place and verified.accuracy is None:  # a file that an older version wrote
        return f"threshold {verified.threshold:.3f}{place}"
    pairs = f"{verified.pairs:,} pairs" if verified.pairs else "the pairs of the training"
    people = f" of {verified.people:,} people" if verified.people else ""
    name = f" ({list_name(verified.pairs_file)})" if verified.pairs_file else ""
    text = f"threshold {verified.threshold:.3f}{place}{',' * bool(place)} from {pairs}{people}{name}"
    if verified.accuracy is None:
        return text
    return f"{text}, where this net is right in {accuracy_in_words(verified)}"


def accuracy_in_words(verified: Verified) -> str:
    """Return the accuracy in percent with half the width of its 95 % interval, such as ``91.2 ± 2.1 %``."""
    assert verified.accuracy is not None
    if verified.accuracy_low is None or verified.accuracy_high is None:
        return f"{100 * verified.accuracy:.1f} %"
    half_width = (verified.accuracy_high - verified.accuracy_low) / 2
    return f"{100 * verified.accuracy:.1f} ± {100 * half_width:.1f} %"


def list_name(pairs_file: str) -> str:
    """Return the last two parts of a path, which name a list of pairs."""
    return str(PurePath(*PurePath(pairs_file).parts[-2:]))


def poor_net(verified: Verified | None) -> str | None:
    """Return a caution about a net that is often wrong, or None if it is good or nobody measured it."""
    if verified is None or verified.accuracy is None or verified.accuracy >= POOR:
        return None
    return f"this net is poor: it is right in {accuracy_in_words(verified)} of the pairs, so do not rely on its answers"


def _by_option(cosine: float, threshold: float, verified: Verified | None, not_square: list[Path]) -> Match:
    """Judge by the user's threshold; say how good the net is at the threshold that a verification measured."""
    source = f"threshold {threshold:.3f} from --threshold"
    if verified is not None and verified.accuracy is not None:
        right = accuracy_in_words(verified)
        source += f"; at its measured threshold {verified.threshold:.3f} this net is right in {right}"
    poor = poor_net(verified)
    cautions = [poor] if poor else _doubt(cosine, threshold, NEAR)
    return Match(cosine, threshold, source, cautions, verified, not_square)


def _by_verification(
    cosine: float, verified: Verified, place: str, same_weights: bool, not_square: list[Path]
) -> Match:
    poor = poor_net(verified)
    cautions = [poor] if poor else _doubt(cosine, verified.threshold, verified.uncertain_within)
    if not same_weights:
        step = "" if verified.step is None else f" (step {verified.step:,})"
        cautions.append(f"the threshold was measured on other weights of this run{step}: verify this checkpoint, too")
    return Match(cosine, verified.threshold, source_in_words(verified, place), cautions, verified, not_square)


def _doubt(cosine: float, threshold: float, uncertain_within: float) -> list[str]:
    """Return a caution if a cosine lies in the uncertain band around the threshold."""
    if abs(cosine - threshold) > uncertain_within:
        return []
    return [f"the cosine lies within {uncertain_within:.3f} of the threshold, where this net is often wrong"]
