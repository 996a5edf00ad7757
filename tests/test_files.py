"""Reading what may be damaged or hostile, and writing whole: what a killed run leaves, the next one clears away."""

import multiprocessing
import os
import time

import pytest

from refimpl.errors import InputError
from refimpl.files import (
    MOMENT,
    filling,
    parse_json,
    read_text,
    replace_folder,
    replacing,
    settle,
    whole_folder,
    write_all,
)  # fmt: skip


def test_json_that_would_fill_the_memory_is_refused_before_it_is_parsed():
    assert parse_json(b"[" + b"0," * 99 + b"0]", values=100) == [0] * 100
    with pytest.raises(ValueError, match="may hold 101 values, expected at most 100"):
        parse_json(b"[" + b"0," * 100 + b"0]", values=100)


def test_a_key_that_comes_twice_is_named():
    keys = b",".join(b'"%d":0' % i for i in range(100_000))
    with pytest.raises(ValueError, match="the key '99999' twice"):
        parse_json(b"{" + keys + b',"99999":1}')


def test_a_text_without_an_end_is_refused(tmp_path):
    with pytest.raises(InputError, match="/dev/zero has more than 1000 bytes of text; cut it"):
        read_text("/dev/zero", 1000)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"as UTF-8 text: .*iconv"):
        read_text(tmp_path / "latin")


def _old(path):
    os.utime(path, (time.time() - 2 * MOMENT,) * 2)


def test_what_killed_runs_left_is_removed_and_what_others_write_stays(tmp_path):
    (tmp_path / ".out.1.partial").mkdir()
    (tmp_path / ".out.1.partial" / "weights").write_text("half")
    (tmp_path / ".out.2.partial").mkdir()  # made just now: its run has not locked it yet
    (tmp_path / ".other.3.partial").mkdir()
    _old(tmp_path / ".out.1.partial")
    with filling(tmp_path / "out") as mine:  # another run, at work
        _old(mine)
        held = mine.rename(mine.with_name(".out.4.partial"))
        with whole_folder(tmp_path / "out"):
            pass
        assert held.exists()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"out", ".out.2.partial", ".other.3.partial", ".out.4.partial"}


def test_a_file_that_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / ".page.html.9.partial").write_text("half")
    _old(tmp_path / ".page.html.9.partial")
    write_all([(tmp_path / "page.html", "whole")])
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_all_files_or_none(tmp_path):
    (tmp_path / "a").write_text("before")
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*b: it is a folder"):
        write_all([(tmp_path / "a", "after"), (tmp_path / "b", "after")])
    with pytest.raises(InputError, match="two files would have this name"):
        write_all([(tmp_path / "a", "after"), (tmp_path / "a", "after")])
    assert (tmp_path / "a").read_text() == "before" and len(list(tmp_path.iterdir())) == 2


def test_a_failure_while_a_file_is_written_leaves_the_old_one(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def _folder(path, **files):
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize("moment", ["before the new folder came", "after it"])
def test_a_swap_that_was_killed_is_undone_or_finished(tmp_path, moment):
    _folder(tmp_path / ".out.replaced", graph="old", ledger="sent")
    if moment == "after it":
        _folder(tmp_path / "out", graph="new")
    settle(tmp_path / "out", ["ledger"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "ledger").read_text() == "sent"
    assert (tmp_path / "out" / "graph").read_text() == ("old" if moment.startswith("before") else "new")


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"

    def expect_free():
        if out.exists():
            raise InputError("out is there")

    with pytest.raises(InputError, match="out is there"), filling(out) as partial:
        _folder(out, graph="theirs")
        replace_folder(partial, out, [], expect_free)
    assert (out / "graph").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


def _race(out, number, gate, results):
    def expect_free():
        if out.exists():
            raise InputError("out is there")

    with filling(out) as partial:
        (partial / "number").write_text(str(number))
        gate.wait()
        try:
            replace_folder(partial, out, [], expect_free)
            results.put(number)
        except InputError:
            results.put(None)


def test_of_two_that_race_one_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    gate, results, out = context.Barrier(2), context.Queue(), tmp_path / "out"
    runs = [context.Process(target=_race, args=(out, number, gate, results)) for number in (1, 2)]
    for run in runs:
        run.start()
    winners = [number for number in (results.get(timeout=20), results.get(timeout=20)) if number]
    for run in runs:
        run.join()
    assert len(winners) == 1 and (out / "number").read_text() == str(winners[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
