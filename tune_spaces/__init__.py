"""Search spaces of Ray Tune, one module per method. Spaces refer to fields through the config's classes."""

import difflib

from fr_core.errors import UserError
from tune_spaces import attfc, bigface, distill, fastface, margins, quantface
from tune_spaces.fields import Knob

SPACES = {
    "attfc": attfc.SPACE,
    "fastface": fastface.SPACE,
    "recurrence": fastface.RECURRENCE,
    "haar": fastface.HAAR,
    "bigface": bigface.SPACE,
    "distill": distill.SPACE,
    "quantface": quantface.SPACE,
    "adaface": margins.ADAFACE,
    "magface": margins.MAGFACE,
    "curricular": margins.CURRICULAR,
    "elastic_arc": margins.ELASTIC_ARC,
    "uniface": margins.UNIFACE,
    "subcentres": margins.SUBCENTRES,
    "ldam": margins.LDAM,
}


def joined(names: str, only: str | None = None) -> list[Knob]:
    """Return the knobs of spaces joined with a plus, such as ``attfc+fastface``.

    If several spaces have a knob of one name, the first space's counts.

    Args:
        names: names of spaces, joined with a plus.
        only: names of the knobs to keep, separated by commas; None keeps all.

    Raises:
        UserError: no such space or knob.
    """
    knobs: dict[str, Knob] = {}
    for name in names.split("+"):
        if name not in SPACES:
            raise UserError(f"no space {name!r}: use {', '.join(SPACES)}, or join several: attfc+fastface")
        for knob in SPACES[name]:
            knobs.setdefault(knob.name, knob)
    if only is None:
        return list(knobs.values())
    for name in only.split(","):
        if name not in knobs:
            near = difflib.get_close_matches(name, knobs, 1)
            hint = f"did you mean {near[0]}?" if near else f"the space has {', '.join(knobs)}"
            raise UserError(f"--only: no knob {name!r} in {names}: {hint}")
    return [knobs[name] for name in only.split(",")]
