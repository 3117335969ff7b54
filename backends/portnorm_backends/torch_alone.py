"""One replacement compared with its module, in evaluation: on calls that a model made, or on random input and states."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence

from portnorm.errors import ConformanceError, PortnormError, UnsupportedError
from portnorm.layers.recurrent import Recurrent
from portnorm_backends.torch_attached import hooks_of_all
from portnorm_backends.torch_compare import SEEDS, Arrays, Call, arrays_in, as_it_was, compare, copied_to, nudged, same_chance, unit
from portnorm_backends.torch_standin import CellStandIn, Form, RecurrentStandIn, StandIn
from portnorm_backends.torch_twin import Twin

_HINT = "What weights do not say (`eps`, `batch_first`, …) can be given as keyword arguments"
_SPACES: dict[type[torch.nn.Module], int] = {
    torch.nn.BatchNorm2d: 2,
    torch.nn.BatchNorm3d: 3,
    torch.nn.InstanceNorm2d: 2,
    torch.nn.InstanceNorm3d: 3,
}
"""How many axes follow the channels where the class says it."""


class Recorded(NamedTuple):
    """A call that a model made of a module."""

    call: Call
    result: Any
    device: str
    narrow: torch.dtype | None
    """That of autocast there, where it was on."""


def check(twin: Twin, calls: list[Recorded] | None) -> None:
    """Compare on the recorded calls, or on random ones; raises `ConformanceError` or `UnsupportedError`."""
    made, mode = twin.made, twin.made.training
    with as_it_was(twin.module), same_chance(twin.module), torch.no_grad():
        twin.module.eval()
        made.eval()
        try:
            if calls is None:
                return _check_random(twin)
            if not calls:
                raise UnsupportedError(f"{twin.title} is not called while the model runs on `args`, so it cannot be compared")
            for call, result, device, narrow in calls:
                with torch.autocast(device, dtype=narrow, enabled=narrow is not None):
                    _compare(twin, call, result, torch.finfo(narrow).eps if narrow is not None else 0.0)
        finally:
            made.train(mode)


def _check_random(twin: Twin) -> None:
    """Without a state where the module takes that, and with a random state in the form that it takes."""
    x, states = _random_inputs(twin.module, twin.made)
    refused, agreed, differ = [], False, []
    for state in states:
        call = Call((x, *state), {})
        try:
            result = twin.module(*call.args)
        except Exception as error:  # whatever somebody else's module raises where it is called in another way than it is meant to be
            refused.append(f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        try:
            _compare(twin, call, result)
            agreed = True
            if state:
                return
        except PortnormError as error:
            if not state:
                raise
            differ.append(error)  # it may have taken the arrays for a state in another form
    if differ:
        raise next((error for error in differ if isinstance(error, ConformanceError)), differ[0])
    if not agreed:
        how = f"`x` {tuple(x.shape)}, alone or with a state in a form that is known" if len(states) > 1 else f"`x` {tuple(x.shape)}"
        raise UnsupportedError(
            f"{twin.title} cannot be called with {how}: {refused[0]}. Give `args`, inputs of the model, for the calls that it makes"
        )


def _random_inputs(module: torch.nn.Module, made: StandIn) -> tuple[torch.Tensor, list[tuple[Any, ...]]]:
    """`x`, and what may follow it: nothing, or a state in one of the forms that modules have."""
    layer = made.to_layer()
    generator = torch.Generator().manual_seed(0)
    lengths = {"batch": 3, "time": 5, "space": 7}
    shape = [d if isinstance(d, int) else lengths[d] for d in layer.input_dims()]
    spaces = next((n for kind, n in _SPACES.items() if isinstance(module, kind)), 0)
    shape = [*shape[:2], *(7, 5, 4)[:spaces]] if spaces else shape
    arrays = list(made.state_dict().values())
    dtype = next((a.dtype for a in arrays if a.is_floating_point()), torch.get_default_dtype())
    device = next((a.device for a in arrays), torch.device("cpu"))

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(device=device, dtype=dtype)

    if isinstance(made, CellStandIn):
        assert isinstance(layer, Recurrent)
        each = [drawn(3, n) for n in layer.state_sizes()]
        return drawn(3, layer.input_size), [(), (tuple(each) if len(each) > 1 else each[0],)]
    x = torch.zeros(*shape, dtype=torch.int64, device=device) if layer.takes_integers else drawn(*shape)
    states: list[tuple[Any, ...]] = [()]
    if isinstance(layer, Recurrent) and not layer.timed:
        places = layer.num_layers * layer.num_directions
        whole = [drawn(places, 3, n) for n in layer.state_sizes()]
        pairs = [tuple(s[k] for s in whole) for k in range(places)]
        nested = [pairs[k : k + layer.num_directions] for k in range(0, places, layer.num_directions)]
        states += [(tuple(whole),), (pairs,), (nested,)] + ([(pairs[0],)] if places == 1 else [])
        if len(whole) == 1:
            states += [(whole[0],)] + ([(pairs[0][0],)] if places == 1 else [])
    return x, states


def _compare(twin: Twin, call: Call, result: Any, least: float = 0.0) -> None:
    """Raise `ConformanceError` where the replacement gives another result, `UnsupportedError` where it gives one of another kind."""
    title, made = twin.title, twin.made
    try:
        if isinstance(made, RecurrentStandIn) and not isinstance(made, CellStandIn):
            made._gives_state = not isinstance(result, torch.Tensor | PackedSequence)
            if made._gives_state and (not isinstance(result, tuple | list) or len(result) != 2):
                raise UnsupportedError(f"{title} gives a {type(result).__name__}; expected `y`, or `y` and a state")
            if made._gives_state and made.bound(*call).get("state") is None and not made._takes_one:
                made._form = Form.of(result[1])
        mine = made(*call.args, **call.kwargs)
    except UnsupportedError:
        raise
    except (TypeError, PortnormError) as error:
        raise UnsupportedError(f"{title} is called in a way that {made!r} cannot be: {error}") from error
    theirs, ours = _named(result), _named(mine)
    shapes = [[tuple(a.shape) for a in side.values()] for side in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise UnsupportedError(f"{title} gives arrays of the shapes {shapes[0]}, but {made!r} gives {shapes[1]}")
    near = []
    for seed in SEEDS:
        with nudged(twin.module, seed) as change:
            near.append(_named(twin.module(*(given := call.fresh(change)).args, **given.kwargs)))

    @functools.cache
    def again(dtype: torch.dtype) -> tuple[Arrays, Arrays] | None:
        copies, given = copied_to(dtype, (twin.module, made)), call.fresh(lambda a: a.to(dtype))
        try:
            if copies is None:
                return None
            theirs, ours = (_named(module(*given.args, **given.kwargs)) for module in copies)
            return theirs, ours
        except (RuntimeError, PortnormError):  # of what has arrays of its own in one dtype
            return None

    try:
        least = max(least, unit(twin.module))
        compare("evaluation", "values", theirs, ours, near, least, f"{title} and {made!r}", again=again)
    except ConformanceError as error:
        raise ConformanceError(f"{error}. {_HINT}{hooks_of_all()}") from error


def _named(result: Any) -> Arrays:
    """The arrays of `y`, or of `y` and a state."""
    if isinstance(result, tuple | list) and not isinstance(result, PackedSequence) and len(result) == 2:
        return {**arrays_in(result[0], "y"), **arrays_in(result[1], "the state")}
    return arrays_in(result, "y")
