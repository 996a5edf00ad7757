"""Graphs and devices: an export compiled, linked and run on devices of Qualcomm AI Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from refimpl.cli.options import JSON
from refimpl.cli.verbs import option, verb

if TYPE_CHECKING:
    from export.hub.loop import Outcome
    from export.hub.session import Session

FOLDER = option("folder", metavar="DIR", help="an export")
API_URL = option("--api-url", metavar="URL", help="another server than that of client.ini")
PLACE = [
    option("--device", required=True, metavar="NAME", help="as AI Hub calls it, such as 'Samsung Galaxy S25'"),
    API_URL,
    option(
        "--qairt", default="2.42", metavar="VERSION", help="version of Qualcomm's runtime, for all jobs (default: 2.42)"
    ),
    option("--compile-options", default="", metavar="TEXT", help="added to those of compile jobs"),
    option("--link-options", default="", metavar="TEXT", help="added to those of link jobs"),
    option("--run-options", default="", metavar="TEXT", help="added to those of inference and profile jobs"),
    JSON,
]
SENDING = [
    FOLDER,
    *PLACE,
    option("--retry", action="store_true", help="send again what failed"),
    option("--unchecked", action="store_true", help="send graphs even if refimpl export --check finds errors in them"),
    option("--dry-run", action="store_true", help="send nothing; print what would be sent, and how large it is"),
]


@verb("refimpl hub compile build/b2-7b --device 'Samsung Galaxy S25' --dry-run", SENDING)
def hub_compile(arguments) -> int:
    """Upload every graph of an export and compile it for a device."""
    return _send(arguments, "compile")


@verb("refimpl hub link build/b2-7b --device 'Samsung Galaxy S25'", SENDING)
def hub_link(arguments) -> int:
    """Link the graphs of each part into one context binary, where they share their weights."""
    return _send(arguments, "link")


@verb("refimpl hub infer build/b2-7b --device 'Samsung Galaxy S25'", SENDING)
def hub_infer(arguments) -> int:
    """Run the golden inputs on the device, isolated and chained, and fetch DIR/outputs."""
    return _send(arguments, "infer")


@verb("refimpl hub profile build/b2-7b --device 'Samsung Galaxy S25'", SENDING)
def hub_profile(arguments) -> int:
    """Measure the time and memory that each graph takes on the device."""
    return _send(arguments, "profile")


@verb(
    "refimpl hub fetch build/b2-7b --device 'Samsung Galaxy S25' --binaries",
    *(FOLDER, PLACE),
    option(
        "--binaries", action="store_true", help="fetch the linked binaries, which go onto the phone, instead of outputs"
    ),
)
def hub_fetch(arguments) -> int:
    """Fetch the outputs of jobs that were sent and are done by now."""
    from export.hub.loop import Loop

    with _session(arguments) as session:
        return _show(arguments, Loop(session).do("binaries" if arguments.binaries else "fetch"))


@verb(
    "refimpl hub status build/b2-7b",
    FOLDER,
    option("--device", metavar="NAME", help="ask again about jobs of this device that had not ended"),
    API_URL,
    JSON,
)
def hub_status(arguments) -> int:
    """Show what was sent and what became of it, from the ledger in DIR."""
    from export.hub.loop import status
    from export.hub.session import Session

    if not arguments.device:
        return _show(arguments, status(Path(arguments.folder)))
    with Session(arguments.folder, arguments.device, arguments.api_url) as session:
        return _show(arguments, status(session.folder, session))


def _session(arguments, locked: bool = True) -> Session:
    from export.hub.session import Session
    from export.phone.options import Options

    options = Options(arguments.qairt, arguments.compile_options, arguments.link_options, arguments.run_options)
    return Session(arguments.folder, arguments.device, arguments.api_url, options,
                   retry=getattr(arguments, "retry", False), locked=locked)  # fmt: skip


def _send(arguments, verb: str) -> int:
    """Sends what a verb needs, or shows it with --dry-run."""
    from export.hub.loop import Loop

    with _session(arguments, locked=not arguments.dry_run) as session:
        loop = Loop(session, checked=not arguments.unchecked)
        if not arguments.dry_run:
            return _show(arguments, loop.do(verb))
        rows = loop.planned(verb)
    if arguments.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(f"{row['kind']:10}{row['label']:44}{'sent before' if row['sent'] else _size(row)}")
    new = [row for row in rows if not row["sent"]]
    uploads = [row for row in new if row["bytes"]]
    disk, whole = loop.on_disk(), sum(row["bytes"] for row in rows if row["kind"] == "model")
    if disk < whole:
        print(f"on this disk the graphs take {disk / 1e6:.1f} MB, because those of a part share their weights; each "
              "upload has its own copy")  # fmt: skip
    print(f"{len(uploads)} uploads of {sum(r['bytes'] for r in uploads) / 1e6:.1f} MB (about "
          f"{sum(r['zipped'] for r in uploads) / 1e6:.1f} MB zipped) and {len(new) - len(uploads)} jobs would be sent "
          f"to {session.url} for {session.device}; {len(rows) - len(new)} were sent before")  # fmt: skip
    return 0


def _size(row: dict) -> str:
    """The size of an upload, or the options of a job."""
    if not row["bytes"]:
        return row["options"]
    return f"{row['bytes'] / 1e6:.1f} MB, about {row['zipped'] / 1e6:.1f} zipped"


def _show(arguments, outcome: Outcome) -> int:
    """Prints what came of the jobs; the exit code is 1 if one failed."""
    content = {"rows": outcome.rows, "failures": outcome.failures, "sent": outcome.sent}
    print(json.dumps(content) if arguments.json else outcome)
    return 0 if outcome else 1
