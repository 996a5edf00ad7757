"""Graphs and devices: Qualcomm's compiler on this machine, and what is in its binaries."""

from __future__ import annotations

from pathlib import Path

from refimpl.cli.verbs import option, verb

SOC = option("--soc", default="8-elite", metavar="NAME",
             help="8-gen-2, 8-gen-3, 8-elite (default), 8-elite-gen-5, x-elite or x2-elite")  # fmt: skip


@verb(
    "refimpl compile build/b2-7b --soc 8-elite --out build/bin",
    option("folder", metavar="DIR", help="an export with codes at its border: refimpl export --border codes"),
    option("--out", required=True, metavar="DIR", help="folder for the binaries; those that are there are kept"),
    SOC,
    option("--desk", action="store_true", help="one binary for each graph, for the emulation on this machine"),
    option("--part", type=int, metavar="N", help="compile only this part"),
)
def compile(arguments) -> int:
    """Compile an export into context binaries with Qualcomm's compiler, on this machine (extra: htp)."""
    from export.phone.compiler import compile_graphs

    print(compile_graphs(arguments.folder, arguments.out, arguments.soc, not arguments.desk, arguments.part))
    return 0


def info_of_binary(arguments) -> int:
    """`refimpl info FILE.bin`: shows what is in a context binary, or where it differs from an export."""
    from export.phone.binary import differences, read_binary

    binary = read_binary(Path(arguments.model))
    if arguments.export:
        found = differences(binary, arguments.export, arguments.soc)
        print(found.to_json() if arguments.json else found)
        return 0 if found else 1
    print(binary.to_json() if arguments.json else binary)
    return 0
