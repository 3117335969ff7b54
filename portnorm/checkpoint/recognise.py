"""Which row of the table of formats explains the names and shapes of arrays, and what to say where none does, or several do."""

from __future__ import annotations

import collections
import itertools
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from portnorm.checkpoint.containers import Arrays
from portnorm.checkpoint.formats import NAMES, ROWS
from portnorm.checkpoint.formats.row import Read, Row
from portnorm.checkpoint.stored import Stored
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
    """The only row that explains the arrays, or the only part of them that is a `layer`. Raises `CheckpointError`."""
    chosen = [row for row in ROWS if (row.auto if format == "auto" else format == row.format) and layer in (None, row.layer)]
    if not chosen:
        raise UnsupportedError(f"`layer` is {layer!r}, which format {format!r} has not; expected one of {', '.join(layers_of(format))}")
    fits, clashes = _fits(chosen, arrays, prefix, ignore)
    exact, plausible = _exact(fits, arrays)
    if len(plausible) == 1:
        return plausible[0]
    of_one = {id(a.said): a.said for a in arrays.values()}
    said = next(iter(of_one.values())) if len(of_one) == 1 else None
    if said is not None and "class_name" in {*said.refused} - ignore:
        why = said.refused["class_name"].why
        raise CheckpointError(f"{said.title} has {why}; pass ignore=('class_name',) where it computes what one of these does")
    if plausible:
        names = ", ".join(f"format={fit.row.format!r} with layer={fit.row.layer!r}" for fit in plausible)
        raise CheckpointError(f"the keys {some(arrays)} fit more than one: {names}; name the one that is meant")
    nearest = sorted((fit for fit in fits if fit.missing or fit.unknown), key=partial(_distance, arrays))
    near = nearest[0] if nearest else None
    wrong = next((fit for fit in fits if not fit.unknown and not fit.missing and fit not in exact and _said_layer(fit, arrays)), None)
    if wrong is not None and not exact:
        said = arrays[next(iter(wrong.keys.values()))].said
        assert said is not None
        for refusal in said.refused.values():
            raise CheckpointError(f"{said.title} has {refusal.why}")
        raise CheckpointError(f"{said.title} has only the arrays {some(arrays)}; expected those of a {said.layer} of portnorm")
    almost = exact or (near is not None and near.row.gates and near.found > 1 and near.found >= len(near.unknown))
    parts = [] if exact else parts_of(chosen, arrays, prefix, ignore)
    if almost and near is not None and (near.missing or sum(part.is_recurrent for part in parts) < 2):
        parts = []  # the keys are rather those of one layer
    if layer is not None and len(parts) == 1 and len(parts[0].fits) == 1:
        if change := [key for key in arrays if key not in ignore and _changes_beside(key, parts[0].prefix)]:
            raise CheckpointError(f"{parts[0]} has {some(change)} beside it: {_MADE_ONE}")
        return parts[0].fits[0]
    if parts:
        raise CheckpointError(_listed(parts, arrays, prefix, layer))
    if layer is not None and not almost:
        others = parts_of([row for row in ROWS if (row.auto if format == "auto" else format == row.format)], arrays, prefix, ignore)
        if others:
            raise CheckpointError(f"there is no {layer}; {_listed(others, arrays, prefix, layer)}")
    problem = next((a.problem for a in arrays.values() if a.problem is not None), None)
    if problem is not None:
        raise CheckpointError(problem)
    for key, a in arrays.items():
        if key not in ignore and a.ndim == 0 and not a.dtype.startswith(("float", "int", "uint", "bool", "bfloat", "complex")):
            raise CheckpointError(f"`{key}` is {a.dtype}; expected an array of numbers; name what is meant by `prefix`, or `ignore` it")
    inside = [key for fit in exact for key in fit.keys.values() if _IN_A_CELL.search(key)]
    if inside and all(fit.row.layer == "Linear" for fit in exact):
        raise CheckpointError(
            f"{inside[0]!r} is a weight of a recurrent cell, not of {_titles(exact)[0]}; format='tensorflow' reads those of cells called "
            "basic_lstm_cell, lstm_cell, gru_cell or basic_rnn_cell: rename what computes like one of them"
        )
    if exact:
        shapes = ", ".join(f"{original!r} {arrays[original].shape}" for original in exact[0].keys.values())
        fitting = next((fit for fit in nearest if not fit.unknown and _is_plausible(fit, arrays)), None)
        other = f"; for {_titles([fitting])[0]} {fitting.missing} is missing" if fitting is not None else ""
        raise CheckpointError(f"the keys are those of {', '.join(_titles(exact))}, but no such layer has these shapes: {shapes}{other}")
    if near is None:
        raise CheckpointError(f"{clashes[0]}; name the one that is meant by `prefix`")
    hint = own_cell(dict(arrays) if near.missing else {key: arrays[key] for key in near.unknown})
    change = [key for key in near.unknown if _CHANGES.search(key)]
    rest = f"; what changes nothing that the layer computes goes into `ignore`{hint}" if near.unknown else ""
    if change:
        rest = f"; {some(change)}: {_MADE_ONE}"
    raise CheckpointError(
        f"the keys do not fit {near.row.format!r} {near.row.title}, the nearest: missing {near.missing or 'nothing'}, "
        f"unknown {near.unknown or 'nothing'}{rest}"
    )


_CHANGES = re.compile(r"(^|[./_])lora(_?[abAB])?([./_]|$)|(^|[./])(\w*weight_scale(_inv)?|scales|absmax|SCB)$")
"""What adapters and quantized weights have beside a matrix."""
_MADE_ONE = "make one array of these and the matrix beside first, such as weight * scale, or W + scale · B·A"


def _changes_beside(key: str, prefix: str) -> bool:
    """Whether an array changes the weights under a prefix, where it lies beside them."""
    match = _CHANGES.search(key)
    return match is not None and key[: match.start()].rstrip("./") == re.sub(r"[^./]+[./]$", "", prefix).rstrip("./")


def _exact(fits: list[Fit], arrays: Arrays) -> tuple[list[Fit], list[Fit]]:
    """The fits that explain every key, and those of them whose shapes can be right."""
    exact = [fit for fit in fits if not fit.unknown and not fit.missing]
    # A row with a learned initial state or unused arrays explains more keys than one without.
    exact = [fit for fit in exact if fit.found == max(e.found for e in exact)]
    exact = [fit for fit in exact if _said_layer(fit, arrays) in (None, fit.row.layer)]
    exact = [fit for fit in exact if not fit.row.asked or all(other.row.layer == fit.row.layer for other in exact)]
    plausible = [fit for fit in exact if _is_plausible(fit, arrays)]
    # A row that explains more of the names says more: `gru_cell/…` is a cell, where `…` alone could be anything.
    plausible = [fit for fit in plausible if fit.explained == max(p.explained for p in plausible)]
    # A norm with one of γ and β is that norm where the other was to be left out; rows that read the same arrays in the same way are one.
    norms = {(fit.row.format, fit.row.layer) if not fit.row.gates else id(fit): fit for fit in reversed(plausible)}
    return exact, list({_meaning(fit): fit for fit in norms.values()}.values())[::-1]


def _distance(arrays: Arrays, fit: Fit) -> tuple[int, int, int, bool]:
    """How far a fit is from all the keys; of layers that share their names, the one that the shapes speak for is nearer."""
    return len(fit.missing) + len(fit.unknown), len(fit.unknown), -fit.explained, not _is_plausible(fit, arrays)


def _said_layer(fit: Fit, arrays: Arrays) -> str | None:
    """The class that the file says the layer has, where all the arrays belong to one."""
    said = {id(a.said): a.said for a in (arrays[key] for key in fit.keys.values())}
    only = next(iter(said.values())) if len(said) == 1 else None
    return None if only is None else only.layer


# -- files of several layers ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A beginning of names under which a layer lies, and what it can be."""

    prefix: str
    fits: list[Fit]

    @property
    def is_linear(self) -> bool:
        return all(fit.row.layer == "Linear" for fit in self.fits)

    @property
    def is_recurrent(self) -> bool:
        return any(fit.row.gates for fit in self.fits)

    def __str__(self) -> str:
        by_format: dict[str, list[str]] = {}
        for fit in self.fits:
            by_format.setdefault(fit.row.format, []).append(fit.row.title)
        said = " or ".join(f"{name} {'/'.join(dict.fromkeys(titles))}" for name, titles in by_format.items())
        return f"prefix={self.prefix!r} ({said})"


def parts_of(rows: list[Row], arrays: Arrays, prefix: str, ignore: set[str]) -> list[Part]:
    """The layers that lie under beginnings of the names, the shortest beginning of each."""
    inside: dict[str, dict[str, Stored]] = {}
    for key, a in arrays.items():
        for beginning in _beginnings(key, len(prefix)):
            inside.setdefault(beginning, {})[key] = a
    quick, found = [(row, *_signature(row)) for row in rows], dict[str, Part]()
    alike = dict[Any, tuple[str, list[Fit]]]()  # a network has the same block many times
    for beginning in sorted(inside, key=lambda e: (len(e), e)):
        own = inside[beginning]
        if len(own) == len(arrays) or any(shorter in found for shorter in _beginnings(beginning, len(prefix))):
            continue
        if _class_not_read(own, ignore) is not None or any(_CHANGES.search(key[len(prefix) :]) for key in own):
            continue
        looks = _looks(own, beginning, ignore)
        if looks is not None and looks in alike:
            before, fits = alike[looks]
            fits = [replace(fit, keys={name: beginning + key[len(before) :] for name, key in fit.keys.items()}) for fit in fits]
        else:
            fits = _fits_of_part(quick, own, beginning, ignore)
            if looks is not None:
                alike[looks] = beginning, fits
        if fits:
            found[beginning] = Part(beginning, fits)
    return list(found.values())


def _looks(arrays: Arrays, beginning: str, ignore: set[str]) -> Any:
    """What decides which rows explain the arrays under a beginning of their names; `None` where more does than what stands here."""
    if any(a.said is not None or key in ignore or _TWICE.search(key) for key, a in arrays.items()):
        return None
    last = re.split(r"[./]", beginning[:-1])[-1]
    return last, beginning[-1], tuple((key[len(beginning) :], a.shape, a.called) for key, a in arrays.items())


_TWICE = re.compile(r"\d\.cell(_fw|_bw)?\.")
"""Names by which paddle stores an array once more; whether it is the same one its values say."""


def _fits_of_part(quick: list[tuple[Row, str, float]], arrays: Arrays, beginning: str, ignore: set[str]) -> list[Fit]:
    leaves = {re.split(r"[./]", key)[-1] for key in arrays}
    numbered = any(leaf.isdecimal() for leaf in leaves)
    possible = [row for row, first, most in quick if len(arrays) <= most and (numbered or any(first in leaf for leaf in leaves))]
    fits = _exact(_fits(possible, arrays, beginning, ignore)[0], arrays)[1] if possible else []
    # A matrix is rather an embedding than a γ.
    return [fit for fit in fits if fit.row.gates or fit.row.layer in ("Linear", "Embedding") or _has_one_axis(fit, arrays)]


def _class_not_read(arrays: Mapping[str, Stored], ignore: set[str]) -> str | None:
    """What the file calls the class of all these arrays, where it is none that is read."""
    said = next(iter(arrays.values())).said
    if said is None or "class_name" not in {*said.refused} - ignore or any(a.said is not said for a in arrays.values()):
        return None
    return said.kind


def _has_one_axis(fit: Fit, arrays: Arrays) -> bool:
    unused = {fit.keys.get(key) for key in fit.row.unused}
    return all(a.ndim == 1 for key, a in arrays.items() if key not in unused)


def _beginnings(key: str, start: int) -> list[str]:
    """What a key begins with, up to each place where a name ends, from the shortest on; `enc_w_ih` begins with `enc_`."""
    short = _SHORT.search(key, start)
    return [key[: k + 1] for k in range(start, len(key)) if key[k] in "./" or (short is not None and k == short.start())]


_SHORT = re.compile(r"_[wb]_(ih|hh)$")


def _signature(row: Row) -> tuple[str, float]:
    """By which a row is found to be worth a closer look: the end of its first key, and how many keys it can have at most."""
    first = next(iter(row.reads.values())).keys[0].rpartition("/")[2].rpartition(".")[2].partition("{")[0]
    keys = [key for read in row.reads.values() for key in read.keys]
    single = not any("{l}" in t for templates in row.places for t in templates) and not any("{t}" in key for key in keys)
    return first, 2 * (len(keys) + len(row.unused) + len(row.first)) if single else math.inf


def _listed(parts: list[Part], arrays: Arrays, prefix: str, layer: str | None) -> str:
    """What a file holds, for somebody who has to name one part of it."""
    shown = sorted((part for part in parts if not part.is_linear), key=lambda part: not part.is_recurrent) or parts
    linear = len(parts) - len(shown) if shown is not parts else 0
    known = {part.prefix: part.is_recurrent for part in parts}
    of_part = {key: next((known[e] for e in _beginnings(key, len(prefix)) if e in known), None) for key in arrays}
    rest = [key for key, recurrent in of_part.items() if recurrent is None]
    alike: dict[str, list[Part]] = {}
    for part in shown:
        alike.setdefault(re.sub(r"\d+", "0", str(part)), []).append(part)
    named = [f"{same[0]}{f' and {len(same) - 1} more with other numbers' if len(same) > 1 else ''}" for same in alike.values()]
    said = ", ".join(named[:_SHOWN]) + (f", … ({len(named)} in all)" if len(named) > _SHOWN else "")
    also = [f"{linear} Linear"] if linear else []
    unread = {id(own): own.kind for key in rest if (own := arrays[key].said) is not None and "class_name" in own.refused}
    kinds = collections.Counter(kind for kind in unread.values() if kind is not None)
    also += [f"{', '.join(f'{count} {kind}' for kind, count in kinds.items())} (classes that are not read)"] if kinds else []
    rest = [key for key in rest if id(arrays[key].said) not in unread]
    also += [f"{len(rest)} other arrays, such as {rest[0]!r}"] if rest else []
    beside = f"; beside {' and '.join(also)}" if also else ""
    choice = " (with `layer` where there are several classes)" if any(len(part.fits) > 1 for part in shown) else ""
    hint = own_cell({key: arrays[key] for key, recurrent in of_part.items() if not recurrent}) if layer is None else ""
    return f"the file holds more than one layer; name one{choice}: {said}{beside}{hint}"


_SHOWN, _GATES = 12, 8


def own_cell(arrays: Arrays) -> str:
    """What to do with a recurrent cell of somebody's own, where the keys look like one: two matrices for the same gates, side by side."""
    beside: dict[tuple[str, ...], list[str]] = {}
    for key in (key for key, a in arrays.items() if a.ndim == 2):
        path = re.split(r"[./]", key)
        for k in range(len(path)):
            beside.setdefault((*path[:k], "", *path[k + 1 :]), []).append(key)
    for keys in beside.values():
        for key in keys if len(keys) <= _GATES else ():
            hidden, shape = _HIDDEN.search(key.lower()), arrays[key].shape
            axis = next((k for k in (0, 1) if shape[k] % max(shape[1 - k], 1) == 0), None)
            others = [o for o in keys if o != key and not _HIDDEN.search(o.lower())]
            other = next((o for o in others if axis is not None and arrays[o].shape[axis] == shape[axis]), None)
            if hidden and other is not None:
                return (
                    f". Are {other!r} and {key!r} a recurrent cell of your own? Then make its layer, with a pn.Variant that says where its "
                    "normalizers and biases are: layer = pn.LSTM(inputs, hidden, norm=pn.Variant(…)), and give it the weights by name, "
                    "layer.load_state_dict({ours: your_arrays[theirs(ours)] for ours in layer.state_dict()}); or call your arrays what "
                    "pn.to_format(layer, format) calls them, and import that. replace_modules takes a function from module to layer"
                )
    return ""


_HIDDEN = re.compile(r"h2|hh|hidden|recurrent|(^|[./_])(u|wh|w_h)(_?[a-z])?($|[./])")
"""What people call matrices that the state is multiplied with."""


def _meaning(fit: Fit) -> tuple[Any, ...]:
    """What a fit makes of the arrays."""
    row, places = fit.row, list(itertools.chain(*fit.places))

    def how(read: Read) -> tuple[Any, ...]:
        keys = [fit.keys.get(k) for place in places for key in read.keys for k in expanded(key, place, fit.keys)]
        gates = row.gates if read.by_gate else ""
        return (*keys, read.transposed, gates, read.at, read.part, read.then, read.join, read.candidate, read.blocks)

    reads = {name: how(read) for name, read in row.reads.items()}
    settings = [sorted(map(repr, mapping.items())) for mapping in (row.changes, row.config)]
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
        if row.layer == "Embedding":
            return ndims == {"weight": 2}
        flat = {1} if any(read.then is None for read in row.reads.values()) else set(ndims.values())  # made so when it is read
        return len(set(ndims.values())) <= 1 and (row.layer in ("LayerNorm", "RMSNorm") or set(ndims.values()) == flat)
    size = None
    for name in [n for n in ("weight_hh", "weight_hh.v") if n in shapes]:
        read = row.reads[name]
        if read.part is None and (len(read.keys) == 1 or read.join is not None) and (read.then is None or len(shapes[name]) != 1):
            ratio = shapes[name] if not read.transposed else shapes[name][::-1]
            if len(ratio) != 2 or ratio[0] % len(row.gates) or ("weight_hr" not in row.reads and ratio[0] != len(row.gates) * ratio[1]):
                return False
            size = ratio[0] // len(row.gates)
    for name, shape in shapes.items():
        read = row.reads[name]
        if name == "weight_hh" and read.part is not None and len(read.keys) == 1:
            inside, left = divmod(shape[1], len(row.gates)) if len(shape) == 2 else (0, 0)
            if left or not 0 < inside < shape[0]:
                return False
        if name.startswith("bias"):
            blocks = read.blocks or (len(row.gates) if read.by_gate and len(read.keys) == 1 else None)
            if len(shape) != 1 + (read.at is not None) or (size and blocks and shape[-1] != blocks * size):
                return False
    return True


_IN_A_CELL = re.compile(r"(lstm|gru|rnn)_cell(_\d+)?/\w+(:0)?$")
"""Names of the weights of a recurrent cell."""


def layers_of(format: str) -> list[str]:  # noqa: A002
    return sorted({row.layer for row in ROWS if format in ("auto", row.format)})


def _fits(rows: list[Row], arrays: Arrays, prefix: str, ignore: set[str]) -> tuple[list[Fit], list[str]]:
    """What the rows make of the arrays: for each alternative of their places, with a part of the names that all share cut off.

    And which keys a format calls by the same name: its rows cannot hold them.
    """
    plain = _Names(arrays, prefix)
    found = [_match(row, templates, keys, ignore) for row in rows for keys in plain.of(row) for templates in row.places]
    return found, plain.clashes


def backward_key(fit: Fit, arrays: Arrays) -> str | None:
    """A key of the backward direction, where a fit has that alone; a prefix may be what says so."""
    row = fit.row
    if len(fit.places[0]) != 1 or row.backward is None:
        return None
    own = {key: arrays[key] for key in fit.keys.values()}
    plain = NAMES[row.format](own) if row.format in NAMES else {key: key for key in own}
    return next((key for key, name in plain.items() if row.backward.search(name)), None)


class _Names:
    """The file's keys by the plain names of a format, with parts that all names share cut off."""

    def __init__(self, arrays: Arrays, prefix: str):
        self.arrays, self.prefix = arrays, prefix
        last = re.search(r"[^./]+[./]$", prefix)
        self.scope = prefix[: last.start()] if last is not None else prefix  # the prefix without its last name
        self.found: dict[tuple[str, str, str], list[dict[str, str]]] = {}
        self.clashes: list[str] = []

    def of(self, row: Row) -> list[dict[str, str]]:
        """For a row that knows the name of a scope, the last name of the prefix may be that one."""
        heads = (self.prefix, self.scope) if row.places[0][0].strip("{l}./_") and self.scope != self.prefix else (self.prefix,)
        return [keys for head in heads for keys in self._cut(row.format, row.separators, head)]

    def _cut(self, format: str, separators: str, head: str) -> list[dict[str, str]]:  # noqa: A002
        how = (format if format in NAMES else "", separators, head)
        if how not in self.found:
            short = {key.removeprefix(head): a for key, a in self.arrays.items()}
            plain = NAMES[format](short) if format in NAMES else {key: key for key in short}
            names: dict[str, str] = {}
            clash = None
            for key, name in plain.items():
                if name in names and clash is None:
                    clash = f"{names[name]!r} and {head + key!r} are both {name!r} in format {format!r}"
                names[name] = head + key
            shared = os.path.commonprefix(list(names))  # noqa: RUF071  # by characters: the keys are no paths
            lengths = (0, *(k + 1 for k, letter in enumerate(shared) if letter in separators))
            self.found[how] = [] if clash is not None else [{name[length:]: key for name, key in names.items()} for length in lengths]
            self.clashes += [] if clash is None else [clash]
        return self.found[how]


def _match(row: Row, templates: tuple[str, ...], keys: dict[str, str], ignore: set[str]) -> Fit:
    anchor = next(iter(row.reads.values())).keys[0]

    def there(template: str, number: int) -> bool:
        return any(k in keys for k in expanded(anchor, template.format(l=number), keys))

    layers = next(n for n in itertools.count() if not there(templates[0], n) or (n == 1 and "{l}" not in templates[0]))
    directions = [t for t in templates if t and there(t, 0)] if len(templates) > 1 else [templates[0]]
    places = [[t.format(l=n) for t in directions or templates[:1]] for n in range(max(layers, 1))]
    wanted = {key for place in itertools.chain(*places) for r in row.reads.values() for k in r.keys for key in expanded(k, place, keys)}
    optional = {placed(key, place) for place in itertools.chain(*places) for key in (*row.unused, *row.first, *row.zero)}
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


def unnamed(fit: Fit, arrays: Arrays) -> list[str]:
    """Keys of what is no weight of its own in a format."""
    plain = NAMES[fit.row.format](arrays) if fit.row.format in NAMES else arrays
    return [key for key in arrays if key not in plain]


def some(arrays: Collection[str]) -> str:
    names = sorted(arrays)
    return ", ".join(names[:6]) + (f", … ({len(names)})" if len(names) > 6 else "")
