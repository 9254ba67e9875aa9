"""The decisions of the program: one unit a module, or a fused group when its modules must share a width."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat
from allocator.contract.scores import Candidate, Fusion, Scores

__all__ = ["NO_RULES", "Choice", "Fusion", "Rules", "Unit", "undominated", "units_of"]


@dataclass(frozen=True)
class Choice:
    """One width of a unit: its formats (one a member), exact bytes, and score."""

    formats: tuple[ModuleFormat, ...]
    nbytes: int
    score: float


@dataclass(frozen=True)
class Unit:
    """Modules that get one width together, and what they can get, fewest bytes first."""

    members: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Rules:
    """What the user forbids, by fnmatch pattern of module names.

    `pins` gives a width, `ceilings` the widest and `floors` the narrowest allowed. Rules count for modules
    that have more than one candidate; a rule that counts for none is an error.
    """

    pins: Mapping[str, int] = field(default_factory=dict)
    ceilings: Mapping[str, int] = field(default_factory=dict)
    floors: Mapping[str, int] = field(default_factory=dict)

    def allowed(self, scores: Scores) -> dict[str, list[Candidate]]:
        """The candidates of each module that no rule forbids. Raises InputError if a module has none left."""
        free = {name: list(m.candidates) for name, m in scores.modules.items()}
        choosable = [name for name, candidates in free.items() if len(candidates) > 1]
        given: dict[str, list[str]] = {}
        for kind, rules in (("pin", self.pins), ("ceiling", self.ceilings), ("floor", self.floors)):
            for pattern, bits in rules.items():
                matching = [name for name in choosable if fnmatchcase(name, pattern)]
                if not matching:
                    raise InputError(f"{kind} {pattern}={bits} {_no_match(pattern, scores)}")
                for name in matching:
                    given.setdefault(name, []).append(f"{kind} {pattern}={bits}")
                    free[name] = [c for c in free[name] if _passes(kind, c.format.num_bits, bits)]
        for name, candidates in free.items():
            if not candidates:
                widths = sorted(c.format.num_bits for c in scores.modules[name].candidates)
                raise InputError(f"{name}: {', '.join(given[name])} leave no width; it has {widths}")
        return free


NO_RULES = Rules()


def units_of(scores: Scores, rules: Rules, fusion: Fusion) -> list[Unit]:
    """The units in order of their first member's name, so that the order of the scores file does not count.

    Raises InputError when the rules leave a module, or the modules of a tied fused group, no common width.
    """
    allowed = rules.allowed(scores)
    groups: dict[str, list[str]] = {}
    for name in sorted(allowed):
        fused = scores.modules[name].fused_group if fusion == "tied" else None
        groups.setdefault(name if fused is None else f"fused:{fused}", []).append(name)
    return [_unit(members, allowed) for members in groups.values()]


def undominated(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """`choices` less those that another beats: in what is left, bytes rise and so does the score that is saved.

    Savings are differences from the smallest choice as floats see them, so that none left is zero.
    """
    first, *larger = sorted(choices, key=lambda c: (c.nbytes, c.score))
    kept = [first]
    for choice in larger:
        if first.score - choice.score > first.score - kept[-1].score:
            kept.append(choice)
    return tuple(kept)


def _unit(members: list[str], allowed: dict[str, list[Candidate]]) -> Unit:
    by_width = [{c.format.num_bits: c for c in allowed[name]} for name in members]
    choices = []
    for bits in sorted(set.intersection(*(set(widths) for widths in by_width))):
        parts = [widths[bits] for widths in by_width]
        choices.append(
            Choice(
                formats=tuple(p.format for p in parts),
                nbytes=sum(p.nbytes for p in parts),
                score=math.fsum(p.score for p in parts),
            )
        )
    if not choices:
        offers = "; ".join(f"{name} {sorted(w)}" for name, w in zip(members, by_width, strict=True))
        raise InputError(f"the modules of a tied fused group have no common width: {offers}; use fusion free")
    return Unit(tuple(members), tuple(sorted(choices, key=lambda c: c.nbytes)))


def _passes(kind: str, num_bits: int, bits: int) -> bool:
    return {"pin": num_bits == bits, "ceiling": num_bits <= bits, "floor": num_bits >= bits}[kind]


def _no_match(pattern: str, scores: Scores) -> str:
    fixed = [name for name in scores.modules if fnmatchcase(name, pattern)]
    if fixed:
        bits = scores.modules[fixed[0]].candidates[0].format.num_bits
        return f"matches only modules without a choice: {fixed[0]} has {bits} bits and nothing else"
    return f"matches no module; a module is named like {next(iter(scores.modules), 'none')}"
