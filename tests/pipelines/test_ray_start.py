"""Starts of Ray that go wrong: dead and wrong addresses, long folders, Ctrl-C. Fake heads are sockets that are mute."""

import os
import signal
import socket
import subprocess
import sys
from unittest.mock import Mock

import pytest
import ray

from fr_core.errors import UserError
from pipelines import ray_start, signals


@pytest.fixture
def mute_head():
    """A head that lets clients connect and says nothing; Ray finds it by this machine's name, not by loopback."""
    with socket.create_server(("", 0)) as server:
        yield server


def address_of(server):
    return f"127.0.0.1:{server.getsockname()[1]}"


def mistake(address):
    with pytest.raises(UserError) as caught:
        ray_start.check_cluster(address)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://ray.example.org", "ray://127.0.0.1:10001"])
def test_a_dashboard_and_a_ray_client_are_no_heads(address):
    assert mistake(address).startswith(f"RAY_ADDRESS={address}: a dashboard or a Ray Client")


def test_a_head_that_never_answers_is_given_up(mute_head, monkeypatch):
    monkeypatch.setattr(ray_start, "PATIENCE", 1.0)
    said = mistake(address_of(mute_head))
    assert "no cluster answers there in 1 s: give HEAD:PORT" in said
    assert said.endswith("unset RAY_ADDRESS to stay here")


def test_what_ray_itself_says_of_an_address_is_told_with_the_mend():
    assert "Invalid address format: nonsense: give HEAD:PORT" in mistake("nonsense")


TRACEBACK = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
ValueError: the first

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "x.py", line 2, in <module>
"""


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            TRACEBACK + "RuntimeError: Version mismatch: the cluster:\n    Ray: 2.1\nThis process:\n    Ray: 2.2\n",
            "2.2: give",
        ),
        (TRACEBACK + "ray.exceptions.RpcError: Method not found!\n", "Method not found!: give"),
        (
            "[2026-11-30 05:26:05,633 E 84 84] core.cc:10: The node is dead. Worker ends. Status: lost.\n",
            "The node is dead: give",
        ),
        (
            TRACEBACK + "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: is missing\n",
            "RAY_AUTH_MODE=token",
        ),
        ("", "Ray ended: give"),
    ],
)
def test_the_last_thing_that_ray_said_is_the_reason(said, why):
    told = ray_start._why_not(said)
    assert why in told
    assert "the first" not in told
    assert "\n" not in told


def test_sockets_fit_below_every_tmpdir(tmp_path, monkeypatch, caplog):
    """At Linux's limit Ray keeps its folder; one letter more, and the session moves, but not the spilled objects."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(ray_start.SPILLED, "")  # so that it is restored
    monkeypatch.delenv(ray_start.SPILLED)
    monkeypatch.setattr(ray_start, "LONGEST_SOCKET", 107 + len(f"{tmp_path}/"))
    longest = 107 - len(ray_start.SOCKET.format(pid=os.getpid())) - len("/ray/")
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * longest)))
    assert ray_start.session_folder() is None
    assert not caplog.records
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * (longest + 1))))
    assert ray_start.session_folder() == ray_start.SHORT_FOLDER
    assert os.environ[ray_start.SPILLED] == f"{tmp_path}/{'x' * (longest + 1)}/ray"
    [said] = caplog.messages
    assert said.endswith("is too long a path for Ray's sockets: its session lies in /tmp/ray")


@pytest.fixture
def no_node(monkeypatch):
    """Ray is not started yet, and a function of the test starts it."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def start(function):
        monkeypatch.setattr(ray, "init", lambda *_, **options: function())

    return start


def test_a_node_that_cannot_start_is_one_line(no_node):
    no_node(Mock(side_effect=OSError("Failed to start GCS.\n  Last lines:\n  no space")))
    with pytest.raises(
        UserError, match=r"^Ray does not start on this machine: Failed to start GCS\. Last lines: no space$"
    ):
        ray_start.start_ray()


def test_a_busy_machine_is_given_more_time(no_node):
    slow = OSError("The current node timed out during startup.")
    start = Mock(side_effect=[slow, slow, None])
    no_node(start)
    ray_start.start_ray()
    assert start.call_count == 3


# Ctrl-C


def interrupted(command, begun, env=None):
    """Send Ctrl-C to a command once it has begun; return its exit code."""
    process = subprocess.Popen(
        command,
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    begun(process)
    os.killpg(process.pid, signal.SIGINT)
    return process.wait(60)


def test_ctrl_c_ends_a_command_that_waits_for_a_head(mute_head, photos, tmp_path, monkeypatch):
    command = [sys.executable, "-m", "pipelines.cli", "ingest", str(photos), "--out", str(tmp_path / "shards")]
    env = {"RAY_ADDRESS": address_of(mute_head)}
    assert interrupted(command, lambda _: mute_head.accept(), env) == 130


DEAF = """
import hashlib, threading
from pipelines import signals
signals.DEAF = 0.1
with signals.hearing_ctrl_c():
    threading.Timer(1, print, ("deaf",), {"flush": True}).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_ctrl_c_ends_native_code_that_does_not_return():
    """The hash takes many minutes, in which Python handles no signal."""
    assert interrupted([sys.executable, "-c", DEAF], lambda process: process.stdout.readline()) == 130


@pytest.fixture
def python_hears_ctrl_c():
    """Python's own handler, which a process in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_an_exception_where_python_hears_it(python_hears_ctrl_c):
    with pytest.raises(KeyboardInterrupt), signals.hearing_ctrl_c():
        signal.raise_signal(signal.SIGINT)
    assert signal.set_wakeup_fd(-1) == -1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


# With Ray itself


@pytest.mark.soak
@pytest.mark.ray
def test_ray_starts_below_a_long_tmpdir(photos, tmp_path):
    """Its own node, since the tests share one."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    command = [sys.executable, "-m", "pipelines.cli", "ingest", str(photos), "--out", str(tmp_path / "shards")]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"TMPDIR": str(long)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{long}/ray is too long a path for Ray's sockets" in done.stderr
