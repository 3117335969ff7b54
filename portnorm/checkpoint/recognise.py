"""Which row of the table of formats explains the names and shapes of arrays, and what to say where none does, or several do."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from portnorm.checkpoint.containers import Arrays
from portnorm.checkpoint.formats import NAMES, ROWS
from portnorm.checkpoint.formats.row import Read, Row
from portnorm.errors import CheckpointError, UnsupportedError


@dataclass(frozen=True)
class Fit:
    """A row that explains arrays."""

    row: Row
    places: list[list[str]]  # per layer, per direction: what stands for {p}
    keys: dict[str, str]  # the file's key by the row's
    unknown: list[str]  # the file's keys that the row does not have
    missing: list[str]  # the row's keys that the file does not have
    found: int
    explained: int  # how many letters of the names the row explains; those before are a prefix


def fit_of(arrays: Arrays, prefix: str, format: str, layer: str | None, ignore: set[str]) -> Fit:  # noqa: A002
    chosen = [row for row in ROWS if (row.auto if format == "auto" else format == row.format) and layer in (None, row.layer)]
    if not chosen:
        raise UnsupportedError(f"`layer` is {layer!r}, which format {format!r} has not; expected one of {', '.join(layers_of(format))}")
    plain = _Names(arrays, prefix)
    fits = [_match(row, templates, keys, ignore) for row in chosen for keys in plain.of(row) for templates in row.places]
    exact = [fit for fit in fits if not fit.unknown and not fit.missing]
    # A row with a learned initial state or unused arrays explains more keys than one without.
    exact = [fit for fit in exact if fit.found == max(e.found for e in exact)]
    plausible = [fit for fit in exact if _is_plausible(fit, arrays)]
    # A row that explains more of the names says more: `gru_cell/…` is a cell, where `…` alone could be anything.
    plausible = [fit for fit in plausible if fit.explained == max(p.explained for p in plausible)]
    # Rows of several formats that read the same arrays in the same way are one.
    plausible = list({_meaning(fit): fit for fit in reversed(plausible)}.values())
    if len(plausible) == 1:
        return plausible[0]
    nearest = sorted(
        (fit for fit in fits if fit.missing or fit.unknown), key=lambda fit: (len(fit.missing) + len(fit.unknown), len(fit.unknown))
    )
    inside = [key for fit in exact for key in fit.keys.values() if _IN_A_CELL.search(key)]
    if inside and all(fit.row.layer == "Linear" for fit in exact) and not plausible:
        raise CheckpointError(
            f"{inside[0]!r} is a weight of a recurrent cell, not of {_titles(exact)[0]}; format='tensorflow' reads those of cells called "
            "basic_lstm_cell, lstm_cell, gru_cell or basic_rnn_cell: rename what computes like one of them"
        )
    if exact and not plausible:
        shapes = ", ".join(f"{original!r} {arrays[original].shape}" for original in exact[0].keys.values())
        near = next((fit for fit in nearest if not fit.unknown and _is_plausible(fit, arrays)), None)
        other = f"; for {_titles([near])[0]} {near.missing} is missing" if near is not None else ""
        raise CheckpointError(f"the keys are those of {', '.join(_titles(exact))}, but no such layer has these shapes: {shapes}{other}")
    exact = plausible
    if exact:
        names = ", ".join(f"format={fit.row.format!r} with layer={fit.row.layer!r}" for fit in exact)
        raise CheckpointError(f"the keys {_some(arrays)} fit more than one: {names}; name the one that is meant")
    best = nearest[0]
    raise CheckpointError(
        f"the keys do not fit {best.row.format!r} {best.row.title}, the nearest: missing {best.missing or 'nothing'}, "
        f"unknown {best.unknown or 'nothing'}"
    )


def parts_of(arrays: Arrays, prefix: str, format: str, layer: str | None, ignore: set[str]) -> list[tuple[str, str]]:  # noqa: A002
    """Beginnings of names under which a layer lies, the shortest of each, and what it is."""
    found: list[tuple[str, str]] = []
    ends = {key[: k + 1] for key in arrays for k in range(len(prefix), len(key)) if key[k] in "./"}
    for part in sorted(ends, key=lambda p: (len(p), p)):
        if any(part.startswith(known) for known, _ in found):
            continue
        inside = {key: a for key, a in arrays.items() if key.startswith(part)}
        if len(inside) == len(arrays):
            continue
        try:
            fit = fit_of(inside, part, format, layer, ignore)
        except CheckpointError:
            continue
        found.append((part, f"{fit.row.format} {fit.row.title}"))
    return found


def _meaning(fit: Fit) -> tuple[Any, ...]:
    """What a fit makes of the arrays."""
    row, places = fit.row, list(itertools.chain(*fit.places))

    def how(read: Read) -> tuple[Any, ...]:
        keys = [fit.keys.get(k) for place in places for key in read.keys for k in expanded(key, place, fit.keys)]
        gates = row.gates if read.by_gate else ""
        return (*keys, read.transposed, gates, read.at, read.part, read.then, read.join, read.candidate)

    reads = {name: how(read) for name, read in row.reads.items()}
    settings = [sorted(map(repr, mapping.items())) for mapping in (row.changes, row.config, row.settings)]
    return (row.layer, row.norm, repr(reads), repr(settings), *sorted(fit.keys.values()))


def _titles(fits: Iterable[Fit]) -> list[str]:
    return list(dict.fromkeys(f"{fit.row.format!r} {fit.row.title}" for fit in fits))


def _is_plausible(fit: Fit, arrays: Arrays) -> bool:
    """Whether the numbers of axes, and of gates, are those of the row: several layers share their keys."""
    row, shapes = fit.row, {}
    for name, read in row.reads.items():
        key = read.keys[0 if read.join is None else -1]
        keys = [fit.keys.get(name) for name in expanded(key, fit.places[0][0], fit.keys)]
        if keys[0] is not None:
            shapes[name] = arrays[keys[0]].shape
    if not row.gates:
        ndims = {name: len(shape) for name, shape in shapes.items()}
        if row.layer == "Linear":
            if any(_IN_A_CELL.search(key) for key in fit.keys.values()):
                return False
            return ndims == {"weight": 2, "bias": 1} or ndims == {"weight": 2}
        return len(set(ndims.values())) <= 1 and (row.layer in ("LayerNorm", "RMSNorm") or set(ndims.values()) == {1})
    for name, shape in shapes.items():
        read = row.reads[name]
        if (
            name in ("weight_hh", "weight_hh.v")
            and read.part is None
            and read.then is None
            and (len(read.keys) == 1 or read.join is not None)
        ):
            ratio = shape if not read.transposed else shape[::-1]
            if len(shape) != 2 or ratio[0] % len(row.gates) or ("weight_hr" not in row.reads and ratio[0] != len(row.gates) * ratio[1]):
                return False
        if name == "weight_hh" and read.part is not None and len(read.keys) == 1:
            hidden, left = divmod(shape[1], len(row.gates)) if len(shape) == 2 else (0, 0)
            if left or not 0 < hidden < shape[0]:
                return False
        if name.startswith("bias") and len(shape) != 1 + (read.at is not None):
            return False
    return True


_IN_A_CELL = re.compile(r"(lstm|gru|rnn)_cell(_\d+)?/\w+(:0)?$")
"""Names of the weights of a recurrent cell."""


def layers_of(format: str) -> list[str]:  # noqa: A002
    return sorted({row.layer for row in ROWS if format in ("auto", row.format)})


class _Names:
    """The file's keys by the plain names of a format, with parts that all names share cut off."""

    def __init__(self, arrays: Arrays, prefix: str):
        self.arrays, self.prefix = arrays, prefix
        last = re.search(r"[^./]+[./]$", prefix)
        self.scope = prefix[: last.start()] if last is not None else prefix  # the prefix without its last name
        self.found: dict[tuple[str, str, str], list[dict[str, str]]] = {}

    def of(self, row: Row) -> list[dict[str, str]]:
        """For a row that knows the name of a scope, the last name of the prefix may be that one."""
        heads = (self.prefix, self.scope) if row.places[0][0].strip("{l}./_") and self.scope != self.prefix else (self.prefix,)
        return [keys for head in heads for keys in self._cut(row.format, row.separators, head)]

    def _cut(self, format: str, separators: str, head: str) -> list[dict[str, str]]:  # noqa: A002
        how = (format if format in NAMES else "", separators, head)
        if how not in self.found:
            short = {key.removeprefix(head): a for key, a in self.arrays.items()}
            plain = NAMES[format](short) if format in NAMES else {key: key for key in short}
            names = {name: head + key for key, name in plain.items()}
            shared = os.path.commonprefix(list(names))  # noqa: RUF071  # by characters: the keys are no paths
            lengths = (0, *(k + 1 for k, letter in enumerate(shared) if letter in separators))
            self.found[how] = [{name[length:]: key for name, key in names.items()} for length in lengths]
        return self.found[how]


def _match(row: Row, templates: tuple[str, ...], keys: dict[str, str], ignore: set[str]) -> Fit:
    anchor = next(iter(row.reads.values())).keys[0]

    def there(template: str, number: int) -> bool:
        return any(k in keys for k in expanded(anchor, template.format(l=number), keys))

    layers = next(n for n in itertools.count() if not there(templates[0], n) or (n == 1 and "{l}" not in templates[0]))
    directions = [t for t in templates if t and there(t, 0)] if len(templates) > 1 else [templates[0]]
    places = [[t.format(l=n) for t in directions or templates[:1]] for n in range(max(layers, 1))]
    wanted = {key for place in itertools.chain(*places) for r in row.reads.values() for k in r.keys for key in expanded(k, place, keys)}
    wanted |= {placed(key, places[0][0]) for key in row.settings.values()}
    optional = {placed(key, place) for place in itertools.chain(*places) for key in (*row.unused, *row.first)}
    known = {key: keys[key] for key in keys if key in wanted | optional}
    missing = [key for key in sorted(wanted - set(keys)) if key not in ignore]
    unknown = [original for key, original in keys.items() if key not in known and not {key, original} & ignore]
    return Fit(row, places, known, unknown, missing, len(known), sum(map(len, known)))


def placed(key: str, place: str) -> str:
    return key.replace("{p}", place) if "{p}" in key else place + key


def expanded(key: str, place: str, keys: Iterable[str]) -> list[str]:
    """The names that a row's key stands for at a place: one, or one for each step."""
    name = placed(key, place)
    if "{t}" not in name:
        return [name]
    head, _, tail = name.partition("{t}")
    steps = sorted(int(m[1]) for k in keys if (m := re.fullmatch(re.escape(head) + r"(\d+)" + re.escape(tail), k)))
    return [f"{head}{t}{tail}" for t in range(max(steps, default=0) + 1)]


def _some(arrays: Mapping[str, Any]) -> str:
    names = sorted(arrays)
    return ", ".join(names[:6]) + (f", … ({len(names)})" if len(names) > 6 else "")
