"""A run that is killed while it writes a checkpoint, for a process of its own."""

import os
import signal
from itertools import count

import fr_core.nets.checkpoint_files as files
import fr_core.train.save as saving
from tests.helpers.runs import config_of, run


def run_until_killed(dataset, out, moment):
    """SIGKILL comes instead of the ``moment``-th of the calls that make a checkpoint, or amid a half-written file."""
    calls, save_file = count(), files.save_file

    def counted(function):
        def call(*args, **kwargs):
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    half_written = counted(lambda: None)

    def save(*args, **kwargs):
        part = args[1]
        save_file(*args, **kwargs)
        os.truncate(part, part.stat().st_size // 2)
        half_written()
        save_file(*args, **kwargs)

    files.save_file = save
    files.sha256 = counted(files.sha256)
    for name in ("write_signed", "copy_file", "remove_folder"):
        setattr(saving, name, counted(getattr(saving, name)))
    run(config_of(dataset, "train.save_every=5", "train.keep=1"), out)
