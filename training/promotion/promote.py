"""`masknet promote`: give an alias to a version that stands the test against its holder."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from features.errors import InputError
from serving.bundle import load_bundle
from serving.models import locate
from training.errors import Failure
from training.numbers import number, signed
from training.promotion.checks import Check, failed
from training.promotion.config import PromotionConfig, load_promotion_config
from training.promotion.names import require_alias, require_reason
from training.promotion.registry import AliasRecord, Change
from training.promotion.trial import Contender, Evidence, Given, Progress, try_out

CHAMPION = "champion"
_METRICS = ("auc", "logloss", "calibration", "ece")  # of a version's tag
PROMOTION_FILE = "promotion.json"  # in the run of the version it is about


class Refused(Failure):
    """The challenger has not passed; `evidence` has every check."""

    def __init__(self, message: str, evidence: Evidence) -> None:
        super().__init__(message)
        self.evidence = evidence


@dataclass(frozen=True, kw_only=True)
class PromoteOptions:
    """What `masknet promote` was asked for; see its --help."""

    model: str
    alias: str = CHAMPION
    given: Given | None = None
    config: Path | None = None
    force: str | None = None


@dataclass(frozen=True)
class Promoted:
    """Who holds the alias now, whom it replaced, why, the checks that were made, and whether the alias has moved."""

    model_uri: str
    alias: str
    replaced: str | None
    reason: str
    checks: tuple[Check, ...] = ()
    moved: bool = True

    def __str__(self) -> str:
        if not self.moved:
            return f"{self.model_uri} {self.reason}: nothing has changed"
        before = f", replacing {self.replaced}" if self.replaced else ""
        return f"{self.model_uri} is now {self.alias}{before}: {self.reason}"

    def plain(self) -> dict[str, Any]:
        """What --json prints."""
        own = {"model_uri": self.model_uri, "alias": self.alias, "replaced": self.replaced, "reason": self.reason}
        return {**own, "checks": [check.plain() for check in self.checks]}


def promote(options: PromoteOptions, progress: Progress | None = None) -> Promoted:
    """Try the model out against the alias's holder; move the alias if it passes, or by force; record why.

    Raises:
        InputError: the model is not in the registry, a bundle is damaged, or the rows cannot judge both models.
        Refused: a check has failed, and nothing has changed.
        Failure: the alias went elsewhere meanwhile.
    """
    config = _checked(options)
    located = locate(options.model)
    if located.version is None:
        raise InputError(
            f"model {options.model!r} is the folder {located.path.resolve()}, no version in the registry: "
            "name models:/name/version or models:/name@alias"
        )
    challenger = Contender(located.uri, load_bundle(located.path))
    record = AliasRecord(located.uri.split("/")[1], options.alias)
    holder = record.holder()
    if holder == located.version:
        return Promoted(located.uri, options.alias, None, f"was {options.alias} already", moved=False)
    evidence = None
    if options.given is not None:
        champion = None if holder is None else _champion(record, holder)
        evidence = try_out(challenger, champion, options.given, config, progress)
    reason = _reason(options, record, holder, evidence)
    require_holder(record, holder)
    replaced = None if holder is None else record.uri(holder)
    promoted = Promoted(located.uri, options.alias, replaced, reason, evidence.checks if evidence else ())
    facts = {"config": config.model_dump(mode="json", by_alias=True), "forced": options.force is not None}
    attach(record, located.version, PROMOTION_FILE, promoted, {**facts, "evidence": evidence and evidence.plain()})
    record.promote(Change(located.version, holder, reason, _tags(options, evidence, located.uri)))
    return promoted


def _checked(options: PromoteOptions) -> PromotionConfig:
    require_alias(options.alias)
    require_reason(options.force)
    if options.given is None and options.force is None:
        raise InputError("give --data or --input, the rows to judge the model by, or --force REASON")
    return load_promotion_config(options.config)


def _champion(record: AliasRecord, holder: str) -> Contender:
    uri = record.uri(holder)
    try:
        return Contender(uri, load_bundle(locate(uri).path))
    except InputError as error:
        raise InputError(
            f"{record.alias} {uri} cannot be compared with: {error}; --force REASON alone promotes without"
        ) from None


def _reason(options: PromoteOptions, record: AliasRecord, holder: str | None, evidence: Evidence | None) -> str:
    """Why the model is promoted; Refused if it is not."""
    lost = failed(evidence.checks) if evidence else []
    if options.force is not None:
        return f"forced: {options.force}"
    assert evidence is not None
    if lost:
        told = "; ".join(map(str, lost))
        raise Refused(f"{options.model} does not become {options.alias} on {evidence.source}: {told}", evidence)
    if holder is None:
        (calibration,) = [check for check in evidence.checks if check.name == "calibration"]
        if calibration.value is None:
            return f"there was no {options.alias}, and no calibration to judge on {evidence.source}"
        return f"calibrated on {evidence.source}, and there was no {options.alias}"
    return f"not worse than {record.uri(holder)} on {evidence.source}"


def _tags(options: PromoteOptions, evidence: Evidence | None, uri: str) -> dict[str, str]:
    """Further tags: the metrics with their differences to the one replaced, and what force has overruled."""
    tags = {} if evidence is None else {"metrics": _metrics_in_short(evidence, uri)}
    if options.force is not None:
        lost = [check.name for check in failed(evidence.checks)] if evidence else ["not evaluated"]
        tags["failed"] = ", ".join(lost) or "none"
    return tags


def _metrics_in_short(evidence: Evidence, uri: str) -> str:
    found = {name: f"{name} {number(evidence.metrics[uri][name].value)}" for name in _METRICS}
    if evidence.comparison is not None:
        for name in ("auc", "logloss"):
            found[name] += f" ({signed(evidence.comparison.differences[name].value)})"
    return f"{', '.join(found.values())}; {evidence.rows:,} rows"


def require_holder(record: AliasRecord, holder: str | None) -> None:
    """Failure if the alias was moved while bundles were opened and rows scored."""
    if record.holder() != holder:
        raise Failure(f"{record.alias} was given to another version meanwhile: run the command again")


def attach(record: AliasRecord, version: str, file: str, done: Promoted, facts: dict[str, Any]) -> None:
    """Store what was done, with the time and further facts, in the run of a version."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    record.attach(version, {**done.plain(), "when": when, **facts}, file)
