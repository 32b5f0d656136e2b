"""`masknet promote` from its options to what it shows."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from features.errors import InputError
from training.progress import stages
from training.promotion.checks import Check
from training.promotion.promote import Promoted, PromoteOptions, Refused, promote
from training.promotion.rollback import roll_back
from training.promotion.trial import Given


def given_rows(data: Path | None, sources: Sequence[str], split: str, max_bad_rows: float) -> Given | None:
    """The rows to judge by, or None; InputError for both kinds of them."""
    if data is not None and sources:
        raise InputError("give either --data or --input")
    if data is None and not sources:
        return None
    return Given(data, tuple(sources), split, max_bad_rows)


def run_promote(options: PromoteOptions, rollback: bool, console: Console) -> Promoted:
    """Promote or roll back; the checks of a refusal are shown on `console`.

    Raises:
        InputError: as `promote` and `roll_back`, and for options that do not go together.
        Failure: as `promote`.
    """
    if rollback:
        if options.given is not None or options.config is not None or options.force is not None:
            raise InputError("--rollback makes no checks: it goes with --alias alone")
        return roll_back(options.model, options.alias)
    try:
        with stages(console) as progress:
            return promote(options, partial(progress, "bootstrap"))
    except Refused as refused:
        console.print(checks_table(refused.evidence.checks))
        raise


def checks_table(checks: Sequence[Check]) -> Table:
    """A row per check: what was found, what is allowed, and whether it was passed."""
    table = Table()
    for name in ("check", "found", "allowed", "passed"):
        table.add_column(name)
    for check in checks:
        passed = Text("yes") if check.passed else Text("no", "bold red")
        table.add_row(Text(check.name), check.shown, check.rule, passed)  # a value in a name may look like markup
    return table
