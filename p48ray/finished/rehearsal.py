"""What publishing would do, for a person who asks before anything is sent."""

from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from p48ray.finished.branch import Hub
from p48ray.finished.publish import lacking, left_over, outdated, read_records
from p48ray.finished.release import Release
from p48ray.report.plan_table import size

TO_SEND, TO_DELETE = "to send", "to delete"
IN_THE_WAY = "in the way (--replace deletes it)"


@dataclass(frozen=True, slots=True)
class FileState:
    """One file: of the release, or weights of what was there before."""

    name: str
    size_bytes: int
    state: str


def rehearse(release: Release, hub: Hub, is_replacing: bool) -> list[FileState]:
    """What `publish` would find. Nothing is sent."""
    hub.check_access()
    records = read_records(hub.target, release)
    branch = hub.state(release.names)
    missing = set(lacking(release, records, branch.files))
    states = []
    for name, num_bytes in [
        *release.shards.items(),
        *((n, len(data)) for n, data in release.files.items()),
    ]:
        state = "on the Hub" if name not in missing else "uploaded" if name in records else TO_SEND
        states.append(FileState(name, num_bytes, state))
    return states + old_files(release, hub, is_replacing)


def old_files(release: Release, hub: Hub, is_replacing: bool) -> list[FileState]:
    """Weights of what was there before, and its figures: of the branch, or of main where there is
    no such branch yet, since a new one begins as a copy of that."""
    branch = hub.state([])
    if branch.head is None:
        hub = replace(hub, target=replace(hub.target, revision="main"))
        branch = hub.state([])
    old = left_over(release, branch.paths)
    states = dict.fromkeys(old, TO_DELETE if is_replacing else IN_THE_WAY)
    states |= dict.fromkeys(outdated(release, branch.paths), TO_DELETE)
    held = hub.state(list(states)).files if states else {}
    return [FileState(name, held[name].size, states[name]) for name in states if name in held]


def print_states(states: list[FileState], hub: Hub, console: Console) -> None:
    """A line a file, then what it comes to."""
    place = f"{hub.target.endpoint}/{hub.target.repo}, branch {hub.target.revision}"
    table = Table("file", "bytes", "state")
    for s in states:
        table.add_row(s.name, f"{s.size_bytes:,}", s.state)
    new = [s for s in states if s.state not in (TO_DELETE, IN_THE_WAY)]
    total = size(sum(s.size_bytes for s in new))
    left = size(sum(s.size_bytes for s in new if s.state == TO_SEND))
    console.print(place, soft_wrap=True, markup=False, highlight=False)
    console.print(table)
    console.print(
        f"{len(new)} files, {total}, to send at most {left}; nothing was sent",
        soft_wrap=True,
        highlight=False,
    )
    if blocking := sum(s.state == IN_THE_WAY for s in states):
        console.print(
            f"{blocking} files of other weights are there: without --replace publishing stops",
            soft_wrap=True,
            highlight=False,
        )
