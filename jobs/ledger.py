"""`alfa ledger`: checks and rebuilds the lists of the photos that each night holds, for `dataset.select: new`."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from jobs.console import make_table, print_json, print_line
from pipeline.lake import Ledger, State, find_ledgers, rebuild_ledger
from pipeline.storage import Store, leases, paths


def run_ledger(output: Store, console: Console, *, rebuild: bool = False, as_json: bool = False) -> int:
    """Prints the state of the ledger of each published night. Returns the exit code.

    rebuild: make each ledger anew from the rows that its night's commit names, and write it where the stored one is
    missing or different. Nothing is removed.
    """
    owner = leases.new_owner()
    there = {info.key for info in output.list(paths.LEDGER)}
    found = [(ledger, _state(output, ledger, there, owner, rebuild)) for ledger in find_ledgers(output)]
    wrong = sum(state is not State.WHOLE for _, state in found)
    stray = len(there - {ledger.key for ledger, _ in found})
    if as_json:
        nights = [
            {"night": ledger.night, "photos": ledger.rows, "errors": _errors(ledger), "state": state.value}
            for ledger, state in found
        ]
        print_json({"output": output.uri(""), "rebuilt": rebuild, "superseded_files": stray, "nights": nights})
        return 0
    table = make_table(("night", "photos", "errors", "ledger"), left=("night", "ledger"))
    for ledger, state in found:
        table.add_row(ledger.night, str(ledger.rows), str(_errors(ledger)), state.value)
    console.print(table)
    for line in _summarise(len(found), wrong, stray, rebuild):
        print_line(console, line)
    return 0


def _state(output: Store, ledger: Ledger, there: set[str], owner: str, rebuild: bool) -> State:
    if rebuild:
        return rebuild_ledger(output, ledger.night, owner)
    return State.WHOLE if ledger.key in there or not ledger.entries else State.MISSING


def _errors(ledger: Ledger) -> int:
    return sum(entry.failed for entry in ledger.entries)


def _summarise(nights: int, wrong: int, stray: int, rebuild: bool) -> Iterator[str]:
    if rebuild:
        yield f"the ledgers of {nights} nights were made anew from their rows: " + (
            f"{wrong} were missing or different and have been written" if wrong else "no difference"
        )
    elif wrong:
        yield f"{wrong} of {nights} ledgers are missing; the next night makes them from the rows, --rebuild does so now"
    if stray:
        yield f"{stray} files belong to no commit and are not read; alfa gc removes them"
