"""Counts what a step costs a card, without a card: ``python -m tests.pretend_card [CASE …]`` prints JSON.

The process that has the pretend card is of its own: its library must be loaded before torch, and torch is changed.
"""

import argparse
import ctypes
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.pretend_card.build import NotBuilt, build_guard
from tests.pretend_card.cases import CASES, OFTEN
from tests.pretend_card.table import cost, read_table, write_table


def main() -> None:
    """Count cases or run the examples, and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.pretend_card", description="Count a step without a card.")
    parser.add_argument("case", nargs="*", default=list(OFTEN), help=f"of: {', '.join(CASES)}")
    parser.add_argument("--guard", type=Path, help="the library; default: build it")
    parser.add_argument("--examples", action="store_true", help="run the examples of the tool's own test instead")
    parser.add_argument("--write-table", action="store_true", help="put the counts of these cases into counts.csv")
    given = parser.parse_args()
    if unknown := [case for case in given.case if case not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            guard = given.guard or build_guard(Path(folder))
        except NotBuilt as error:
            sys.exit(str(error))
        ctypes.CDLL(str(guard), mode=ctypes.RTLD_GLOBAL)
        found = examples() if given.examples else count(given.case, Path(folder))
    print(json.dumps(found, indent=1))
    if given.write_table:
        trained = {case: cost(counted) for case, counted in found.items() if counted["refused"] is None}
        write_table(read_table() | trained, CASES)


def count(cases: list[str], folder: Path) -> dict[str, Any]:
    """Train the cases on the pretend card."""
    os.environ["TRITON_INTERPRET"] = "1"  # for Triton's first import
    import torch  # after the library
    from matplotlib.figure import Figure

    from tests.helpers.ranks import undrawn
    from tests.pretend_card.card import plug_in
    from tests.pretend_card.kernels import run_kernels
    from tests.pretend_card.train import train, write_files

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    Figure.savefig = undrawn  # type: ignore[method-assign, assignment]
    write_files(folder)
    card = plug_in()
    run_kernels(card)
    return {case: train(case, folder, card) for case in cases}


def examples() -> dict[str, Any]:
    """Run the examples on the pretend card."""
    from tests.pretend_card.card import plug_in
    from tests.pretend_card.examples import run_examples

    return run_examples(plug_in())


if __name__ == "__main__":
    main()
