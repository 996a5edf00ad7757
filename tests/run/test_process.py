"""A process of its own: whatever happens in it, the one who asks gets one line, and goes on."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from export.run.process import EndedError, Process, read_arrays, write_arrays
from refimpl.errors import InputError

HERE = Path(__file__).stem


def loud(folder, text):
    """Writes past Python's streams, as a C library does, on both."""
    libc = ctypes.CDLL(None)
    libc.puts(text.encode())
    libc.fflush(None)
    os.write(2, b"and on the other stream\n")
    print('{"not": "an answer"}', flush=True)
    return {"heard": sys.stdin.read()}


def crash(folder, how):
    os.write(2, b"about to go\n")
    if how == "abort":
        os.abort()
    if how == "segfault":
        ctypes.string_at(0)
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def sleep(folder, seconds):
    time.sleep(seconds)
    return {}


def grow(folder, size):
    kept = np.ones(size, np.uint8)
    time.sleep(20)
    return {"kept": len(kept)}


def refuse(folder, text, kind):
    raise {"InputError": InputError, "RuntimeError": RuntimeError}[kind](text)


def count(folder, to):
    for i in range(to):
        yield {"i": i}
    return {"all": to}


def twice(folder, arrays):
    found = read_arrays(folder / "in", arrays)
    return {"arrays": write_arrays(folder / "out", {name: array * 2 for name, array in found.items()})}


def pid(folder):
    return {"pid": os.getpid()}


JOBS = {f.__name__: f for f in (loud, crash, sleep, grow, refuse, count, twice, pid)}


def test_noise_on_both_streams_reaches_nobody(capfd):
    with Process(HERE) as child:
        assert child.ask("loud", text="QNN says something") == {"heard": ""}
        assert "QNN says something" in child.log.read_text()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("how", "told"), [("abort", "SIGABRT"), ("segfault", "SIGSEGV"), ("kill", "SIGKILL"), ("exit", "code 3")]
)
def test_a_crash_is_one_line_with_what_was_said_last(how, told):
    with Process(HERE) as child:
        with pytest.raises(EndedError, match=f"the process ended (by|with) {told}; the last it said is: about to go"):
            child.ask("crash", how=how)
        assert not child.alive
        with pytest.raises(EndedError, match="has ended before"):
            child.ask("pid")


def test_time_is_limited():
    with Process(HERE) as child:
        child.ask("pid")
        child.seconds = 0.3
        with pytest.raises(EndedError, match=r"not done in 0\.3 s"):
            child.ask("sleep", seconds=60)
        assert not child.alive


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is looked at in /proc")
def test_memory_is_limited():
    with Process(HERE, memory=400 << 20) as child:
        child.ask("pid")
        with pytest.raises(EndedError, match=r"needed more than 0\.4 GiB"):
            child.ask("grow", size=600 << 20)


@pytest.mark.parametrize(("kind", "told"), [("InputError", "it is bad"), ("RuntimeError", "RuntimeError: it is bad")])
def test_what_a_job_raises_is_one_line_and_the_process_goes_on(kind, told):
    with Process(HERE) as child:
        with pytest.raises(InputError) as error:
            child.ask("refuse", text="it is\nbad", kind=kind)
        assert str(error.value).replace("\\n", " ") == told
        with pytest.raises(InputError, match="KeyError"):
            child.ask("no such job")
        assert child.ask("pid")["pid"] != os.getpid()


def test_messages_come_before_the_answer():
    with Process(HERE) as child:
        assert list(child.hear("count", to=2)) == [{"i": 0}, {"i": 1}, {"all": 2}]
        assert child.ask("count", to=5) == {"all": 5}
        assert child.peak > 10 << 20


def test_arrays_go_through_files_without_pickles(tmp_path):
    with Process(HERE) as child:
        given = {"a/b": np.arange(6, dtype=np.uint16).reshape(2, 3), "": np.float32(3.0)}
        answer = child.ask("twice", arrays=write_arrays(child.folder / "in", given))
        found = read_arrays(child.folder / "out", answer["arrays"])
        folder = child.folder
    assert list(found) == list(given) and found["a/b"].dtype == np.uint16
    assert np.array_equal(found["a/b"], given["a/b"] * 2)
    assert not folder.exists()
    np.save(tmp_path / "0.npy", np.array([{}], object))
    with pytest.raises(InputError, match="no arrays"):
        read_arrays(tmp_path, [["x", "0.npy"]])
    with pytest.raises(InputError, match="no arrays"):
        read_arrays(tmp_path, [["x", "../../etc/passwd"]])


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_parent_leaves_no_process_behind():
    """The child is in the midst of a job when its parent is killed."""
    text = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from export.run.process import Process\nwith Process({HERE!r}) as child:\n"
        "    print(child.ask('pid')['pid'], flush=True)\n    child.ask('sleep', seconds=60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", text],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").exists() and ") Z " in Path(f"/proc/{child}/stat").read_text():
            return  # dead, and nobody has asked for it yet
        time.sleep(0.05)
    raise AssertionError("the child works on for nobody")
