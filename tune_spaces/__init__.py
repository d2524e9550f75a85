"""Search spaces of Ray Tune, one module a method; they refer to fields through the config's classes."""

import difflib

from fr_core.errors import UserError
from tune_spaces import attfc, bigface, distill, fastface, quantface
from tune_spaces.fields import Knob

SPACES = {
    "attfc": attfc.SPACE,
    "fastface": fastface.SPACE,
    "haar": fastface.HAAR,
    "bigface": bigface.SPACE,
    "distill": distill.SPACE,
    "quantface": quantface.SPACE,
}


def joined(names: str, only: str | None = None) -> list[Knob]:
    """Knobs of spaces that are named as ``attfc+fastface``; of a field in several spaces, the first one's.

    Args:
        only: names of the knobs to keep, with commas between; None: all.

    Raises:
        UserError: no such space or knob.
    """
    knobs: dict[str, Knob] = {}
    for name in names.split("+"):
        if name not in SPACES:
            raise UserError(f"no space {name!r}: use {', '.join(SPACES)}, or several as attfc+fastface")
        for knob in SPACES[name]:
            knobs.setdefault(knob.name, knob)
    if only is None:
        return list(knobs.values())
    for name in only.split(","):
        if name not in knobs:
            near = difflib.get_close_matches(name, knobs, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(knobs)}"
            raise UserError(f"--only: no knob {name!r} in {names}: {hint}")
    return [knobs[name] for name in only.split(",")]
