"""The words for the state of a run, the same in every table.

- running: the run takes steps, or waits for its turn.
- finished: it took its last step.
- failed: an error ended it.
- stopped: the scheduler of a search or SIGTERM ended it early.
- interrupted: it ended before its last step, and nobody recorded why; --resume goes on. A run that has shown no sign
  of life for three minutes counts as interrupted.
"""

from typing import Literal, get_args

State = Literal["running", "finished", "failed", "stopped", "interrupted"]
STATES: tuple[State, ...] = get_args(State)  # in the order of tables

# MLflow has one word, KILLED, for runs that were stopped and for trials that the end of their search interrupted.
OF_MLFLOW: dict[str, State] = {
    "SCHEDULED": "running",
    "RUNNING": "running",
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "stopped",
}
