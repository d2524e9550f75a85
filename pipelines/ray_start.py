"""Starts Ray: joins the cluster that ``RAY_ADDRESS`` names, or starts a node here that ends with this process."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from fr_core.errors import UserError
from pipelines.logs import log
from pipelines.signals import hearing_ctrl_c

LOCAL = "local"  # Ray's word for a node of its own
START_ATTEMPTS = 3
PATIENCE = 40.0  # seconds for a head to answer; a busy machine needs ten to join one that is well
JOIN = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False)"
EXCEPTION = re.compile(r"^[\w.]+(?:Error|Exception): ", re.MULTILINE)  # last part of a traceback
EVENT = re.compile(r"^\[.*\] \S+: ", re.MULTILINE)  # of Ray's native code: time, process, place
MEND = "give HEAD:PORT of `ray start --head`, or auto on a machine of the cluster; unset RAY_ADDRESS to stay here"
SHORT_FOLDER = "/tmp/ray"  # Ray's own default where TMPDIR is not set
SPILLED = "RAY_object_spilling_directory"  # Ray's variable for objects that do not fit the memory
LONGEST_SOCKET = 107  # bytes that Linux allows
SOCKET = "session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"  # the longest of a session


def ray_address() -> str:
    """Return the address of ``RAY_ADDRESS``, or ``local``."""
    return os.environ.get("RAY_ADDRESS") or LOCAL


def start_ray(dashboard: bool = False) -> None:
    """Join the cluster of ``RAY_ADDRESS``, or start a local node that ends with this process. Ctrl-C works meanwhile.

    Raises:
        UserError: no cluster answers at ``RAY_ADDRESS``, or no local node starts.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 lets other processes starve the training
    import ray

    if ray.is_initialized():
        return
    address = ray_address()
    with hearing_ctrl_c():
        if address == LOCAL:
            _start_node(dashboard)
        else:
            check_cluster(address)
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            except ConnectionError as error:  # it ended after the check
                raise UserError(f"RAY_ADDRESS={address}: {_in_one_line(str(error))}: {MEND}") from None


def check_cluster(address: str) -> None:
    """Join the cluster at an address in a process of its own, and leave it.

    Ray tries a dead address for many minutes, is deaf to Ctrl-C meanwhile, and ends the process if a node's part hangs.
    The other process can be ended at any time. It needs a second.

    Raises:
        UserError: no cluster answers at the address.
    """
    if "://" in address:
        raise UserError(f"RAY_ADDRESS={address}: a dashboard or a Ray Client, which cannot be joined: {MEND}")
    command = [sys.executable, "-P", "-c", JOIN, address]
    try:
        joined = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise UserError(f"RAY_ADDRESS={address}: no cluster answers there in {PATIENCE:.0f} s: {MEND}") from None
    if joined.returncode:
        raise UserError(f"RAY_ADDRESS={address}: {_why_not(joined.stderr)}")


def session_folder() -> str | None:
    """Return the folder for the sessions of a local node; None leaves it to Ray, which takes ``TMPDIR``.

    A session has sockets, whose paths Linux limits. If ``TMPDIR`` is too long for them, the session lies in a short
    folder. Objects that do not fit the memory are still written below ``TMPDIR``.
    """
    place = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"
    if len(os.fsencode(place / SOCKET.format(pid=os.getpid()))) <= LONGEST_SOCKET:
        return None
    log.warning("%s is too long a path for Ray's sockets: its session lies in %s", place, SHORT_FOLDER)
    os.environ.setdefault(SPILLED, str(place))
    return SHORT_FOLDER


def _start_node(dashboard: bool) -> None:
    """Start a local node, with several tries: a busy machine may need more than the 30 s that Ray gives one."""
    import ray

    folder = session_folder()
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                LOCAL, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR, _temp_dir=folder
            )
            return
        except Exception as error:  # Ray has no class for a timeout
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS - 1:
                raise UserError(f"Ray does not start on this machine: {_in_one_line(str(error))}") from None


def _why_not(said: str) -> str:
    """Return in one line why a process could not join a cluster.

    Args:
        said: standard error of the process. Ray may end it without an exception.
    """
    if "InvalidAuthToken" in said:
        return "the cluster wants a token: set RAY_AUTH_MODE=token, and copy its ~/.ray/auth_token to this machine"
    if EXCEPTION.search(said):
        reason = _in_one_line(EXCEPTION.split(said)[-1])
    else:
        reason = EVENT.split(said)[-1].split(". ")[0].strip() or "Ray ended"
    return f"{reason.rstrip('.')}: {MEND}"


def _in_one_line(text: str) -> str:
    return " ".join(text.split())
