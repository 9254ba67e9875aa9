"""How a size follows from keys of config.json, found from models of several sizes.

Each key has another value in each of the models; a size that is found is one number for each of them too, its trace.
The shortest expression that has this trace is taken: `num_key_value_heads*head_dim`, not another that happens to give
the same for one model.
"""

from collections.abc import Mapping
from itertools import combinations_with_replacement
from math import prod

__all__ = ["Expressions", "Trace"]

Trace = tuple[int, ...]


class Expressions:
    """Sums of products and quotients of config keys. `keys` has the trace of each key, `constant` the keys that
    have one value in all models, `derived` the traces of sizes that are computed in another way. A size may be
    `times` a number that is the same in all models, by the key that says it, but not that number alone."""

    def __init__(
        self,
        keys: Mapping[str, Trace],
        constant: Mapping[str, int],
        derived: Mapping[str, Trace] | None = None,
        times: Mapping[str, int] | None = None,
    ) -> None:
        self._models = len(next(iter(keys.values())))
        singles = {name: trace for name, trace in keys.items() if len(set(trace)) == self._models}
        self._simple = _shortest(
            [
                *((trace, name) for name, trace in {**singles, **(derived or {})}.items()),
                *(((n,) * self._models, str(n)) for n in (1, 2, 3)),
                *(((n,) * self._models, name) for name, n in constant.items() if n > 3),
            ]
        )
        pairs = list(combinations_with_replacement(singles.items(), 2))
        products = [(_multiply(a, b), f"{m}*{n}") for (m, a), (n, b) in pairs]
        quotients = [
            (q, f"{m}/{n}") for m, a in singles.items() for n, b in singles.items() if m != n and (q := _divide(a, b))
        ]
        products += [(_multiply(trace, b), f"{text}*{n}") for trace, text in quotients for n, b in singles.items()]
        products += [(_multiply(trace, (2,) * self._models), f"{text}*2") for trace, text in products[: len(pairs)]]
        products += [
            (_multiply(trace, (k,) * self._models), f"{text}*{k}") for trace, text in self._items() for k in (2, 3)
        ]
        triples = [
            (_multiply(trace, b), f"{text}*{n}")
            for trace, text in [(_multiply(a, b), f"{m}*{n}") for (m, a), (n, b) in pairs]
            for n, b in singles.items()
        ]
        triples += [
            (_multiply(trace, (number,) * self._models), f"{key}*{name}")
            for key, number in (times or {}).items()
            for name, trace in singles.items()
        ]
        self._terms = _shortest([*((t, n) for t, n in self._simple.items()), *quotients, *products])
        self._rare = _shortest(triples)

    def of(self, trace: Trace) -> str | None:
        """The expression of the size `trace`, None if there is none."""
        for terms in (self._simple, self._terms, self._rare):
            if trace in terms:
                return terms[trace]
        two = self._sum(trace)
        if two is not None:
            return two
        for first, text in self._terms.items():
            rest = self._sum(tuple(t - f for t, f in zip(trace, first, strict=True)))
            if rest is not None:
                return f"{text}+{rest}"
        return None

    def _items(self) -> list[tuple[Trace, str]]:
        return list(self._simple.items())

    def _sum(self, trace: Trace) -> str | None:
        found = []
        for first, text in self._terms.items():
            rest = tuple(t - f for t, f in zip(trace, first, strict=True))
            if rest in self._terms:
                found.append(f"{text}+{self._terms[rest]}")
        return min(found, key=_length, default=None)


def _length(text: str) -> tuple[int, int, str]:
    return sum(text.count(sign) for sign in "*/+"), len(text), text


def _shortest(found: list[tuple[Trace, str]]) -> dict[Trace, str]:
    """The shortest text of each trace, shortest first."""
    best: dict[Trace, str] = {}
    for trace, text in sorted(found, key=lambda item: _length(item[1])):
        best.setdefault(trace, text)
    return best


def _multiply(a: Trace, b: Trace) -> Trace:
    return tuple(prod(pair) for pair in zip(a, b, strict=True))


def _divide(a: Trace, b: Trace) -> Trace | None:
    if any(x % y for x, y in zip(a, b, strict=True)):
        return None
    return tuple(x // y for x, y in zip(a, b, strict=True))
