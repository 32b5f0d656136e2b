"""`masknet promote --rollback`: give an alias back to the one that held it before."""

from features.errors import InputError, listed
from serving.bundle import load_bundle
from serving.models import locate
from training.promotion.names import require_alias, require_name
from training.promotion.promote import CHAMPION, Promoted, attach, require_holder
from training.promotion.registry import AliasRecord, Change

ROLLBACK_FILE = "rollback.json"  # in the run of the version that lost the alias


def roll_back(model: str, alias: str = CHAMPION) -> Promoted:
    """Give the alias back to the version that held it before and whose bundle opens; record it.

    Along the stack of holders (`training.promotion.registry`): again goes on to the one before that, never forth.
    Versions that were deleted or are damaged are passed over, which the reason says. One that was killed after it had
    moved the alias is ended, and nothing else is done.

    Raises:
        InputError: none held the alias before, or none that did is left.
        Failure: the alias went elsewhere meanwhile.
    """
    require_alias(alias)
    record = AliasRecord(require_name(model, alias), alias)
    stack, holder = record.stack(), record.holder()
    if not stack:
        raise InputError(f"no version of models:/{record.name} has held the alias {alias}")
    unfinished = record.unfinished()
    if unfinished is not None:
        record.finish_rollback()
        last, reason = unfinished
        return Promoted(record.uri(stack[-1]), alias, record.uri(last), f"{reason} (it was interrupted; ended now)")
    last = stack[-1]
    below, passed_over = _down_to_intact(record, stack)
    target = below[-1]
    reason = f"rolled back from {record.uri(last)}" + (f", past {listed(passed_over)}" if passed_over else "")
    rolled_back = Promoted(record.uri(target), alias, None if holder is None else record.uri(holder), reason)
    require_holder(record, holder)
    if holder is not None:
        attach(record, holder, ROLLBACK_FILE, rolled_back, {})
    record.roll_back(Change(target, holder, reason, {}), below, last)
    return rolled_back


def _down_to_intact(record: AliasRecord, stack: list[str]) -> tuple[list[str], list[str]]:
    """The stack down to a version that can take over from its top, and what was passed over in short."""
    *below, last = stack
    if not below:
        raise InputError(f"{record.uri(last)} is the first {record.alias}: there is none before it to go back to")
    lost: dict[str, str] = {}
    for height in range(len(below), 0, -1):
        version = below[height - 1]
        if version == last or version in lost:  # from a version to itself is no way back
            continue
        why = _why_not(record, version)
        if why is None:
            return below[:height], [f"version {number}, which {why.partition(':')[0]}" for number, why in lost.items()]
        lost[version] = why
    told = "; ".join(f"{record.uri(version)} {why}" for version, why in lost.items()) or "it was no other"
    raise InputError(f"none that was {record.alias} before {record.uri(last)} is left to go back to: {told}")


def _why_not(record: AliasRecord, version: str) -> str | None:
    """Why a version cannot take over; None if it can."""
    if not record.exists(version):
        return "was deleted"
    try:
        load_bundle(locate(record.uri(version)).path)
    except InputError as error:
        return f"does not open: {error}"
    return None
