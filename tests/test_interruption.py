"""Ctrl-C is heard at once, and the second one ends what does not hear it."""

import signal
import subprocess
import sys
import threading

import pytest

from mor.interruption import deaf_children, interruptible

# A single call that Python cannot interrupt, as a long backward pass is.
DEAF = """
import hashlib, threading
from mor import interruption
interruption.GRACE_S = 0.05
with interruption.{context}:
    # From within the call, which lets other threads run.
    threading.Timer(0.5, lambda: print("ready", flush=True)).start()
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000_000)
"""


@pytest.mark.parametrize(
    "context", ["leaving_at_second()", "interruptible(lambda: print('heard', flush=True))"]
)
def test_the_second_ctrl_c_ends_a_process_inside_one_long_operation(context):
    code = DEAF.format(context=context)
    process = subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    if "heard" in context:
        assert process.stdout.readline() == "heard\n", "at once, and the operation goes on"
    while process.poll() is None:  # two signals that come together can be one
        process.send_signal(signal.SIGTERM if "heard" in context else signal.SIGINT)
        threading.Event().wait(0.02)
    assert process.returncode == 130 and process.stderr.read() == "interrupted\n"


def test_the_first_is_written_down_and_the_second_raises():
    before, said = signal.getsignal(signal.SIGTERM), threading.Event()
    with pytest.raises(KeyboardInterrupt), interruptible(said.set) as asked:
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM] and said.wait(10)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_the_main_thread_signals_are_somebody_elses():
    def work():
        with interruptible(lambda: None) as asked:
            found.append(asked)

    found = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[]]


def test_children_ignore_ctrl_c_from_their_first_moment_and_go_on_to_do_so():
    code = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    before = signal.getsignal(signal.SIGINT)
    with deaf_children():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        with interruptible(lambda: None) as asked:
            signal.raise_signal(signal.SIGINT)
    assert done.stdout == "True\n" and asked == []
    assert signal.getsignal(signal.SIGINT) == before
