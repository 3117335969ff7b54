"""The layers of flax, equinox and haiku, and what `jax.nn` has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from portnorm.conform.cases import STATISTICS, NumPyArray
from portnorm.conform.subjects import Call, Subject, installed


def _array(a: NumPyArray, dtype: str) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(a)


def _values(a: Any) -> NumPyArray:
    return numpy.asarray(a).astype(numpy.float64)


# -- flax ----------------------------------------------------------------------------------------------------------------------------------


def _last(x: Any) -> Any:
    import jax.numpy as jnp

    return jnp.moveaxis(x, 1, -1)


def _first(y: Any) -> Any:
    import jax.numpy as jnp

    return jnp.moveaxis(y, -1, 1)


def _flax(fast: bool) -> dict[str, Call]:
    """Layers of `flax.nnx`, which have channels last."""

    def made(kind: str, channels: int, eps: float, x: Any, weight: Any, bias: Any, **more: Any) -> Any:
        from flax import nnx

        layer = getattr(nnx, kind)(channels, epsilon=eps, use_fast_variance=fast, dtype=x.dtype, rngs=nnx.Rngs(0), **more)
        layer.scale.set_value(weight)
        if kind != "RMSNorm":
            layer.bias.set_value(bias)
        return layer

    def layer(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return made("LayerNorm", x.shape[-1], eps, x, weight, bias)(x)

    def rms(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return made("RMSNorm", x.shape[-1], eps, x, weight, bias)(x)

    def group(x: Any, weight: Any, bias: Any, eps: float, groups: int) -> Any:
        return _first(made("GroupNorm", x.shape[1], eps, x, weight, bias, num_groups=groups)(_last(x)))

    def instance(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return _first(made("InstanceNorm", x.shape[1], eps, x, weight, bias)(_last(x)))

    def batch(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        norm = made("BatchNorm", x.shape[1], eps, x, weight, bias, momentum=0.0, use_running_average=False)
        y = norm(_last(x))
        return _first(y), norm.mean.get_value(), norm.var.get_value()

    def given(x: Any, weight: Any, bias: Any, eps: float, mean: Any, var: Any) -> Any:
        norm = made("BatchNorm", x.shape[1], eps, x, weight, bias, use_running_average=True)
        norm.mean.set_value(mean)
        norm.var.set_value(var)
        return _first(norm(_last(x)))

    return {"layer_norm": layer, "rms_norm": rms, "group_norm": group, "instance_norm": instance, "batch_norm": batch, STATISTICS: given}


# -- equinox -------------------------------------------------------------------------------------------------------------------------------


def _with(layer: Any, weight: Any, bias: Any) -> Any:
    import equinox

    layer = equinox.tree_at(lambda n: n.weight, layer, weight)
    return layer if getattr(layer, "bias", None) is None else equinox.tree_at(lambda n: n.bias, layer, bias)


def _equinox_layer(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    import equinox
    import jax

    return jax.vmap(_with(equinox.nn.LayerNorm(x.shape[-1], eps, dtype=x.dtype), weight, bias))(x)


def _equinox_rms(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    import equinox
    import jax

    return jax.vmap(_with(equinox.nn.RMSNorm(x.shape[-1], eps, use_bias=False, dtype=x.dtype), weight, bias))(x)


def _equinox_group(x: Any, weight: Any, bias: Any, eps: float, groups: int) -> Any:
    import equinox
    import jax

    return jax.vmap(_with(equinox.nn.GroupNorm(groups, x.shape[1], eps, dtype=x.dtype), weight, bias))(x)


def _equinox_module(x: Any, weight: Any, bias: Any, eps: float) -> tuple[Any, Any]:
    import equinox

    def make() -> Any:
        return _with(equinox.nn.BatchNorm(x.shape[1], "batch", eps=eps, momentum=0.0, mode="batch", dtype=x.dtype), weight, bias)

    layer, state = equinox.nn.make_with_state(make)()
    return layer, state


def _equinox_run(layer: Any, state: Any, x: Any) -> Any:
    import jax

    return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)


def _equinox_batch(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    layer, state = _equinox_module(x, weight, bias, eps)
    y, state = _equinox_run(layer, state, x)
    mean, var = state.get(layer.batch_state_index)
    return y, mean, var


def _equinox_given(x: Any, weight: Any, bias: Any, eps: float, mean: Any, var: Any) -> Any:
    import equinox
    import jax.numpy as jnp

    layer, state = _equinox_module(x, weight, bias, eps)
    state = state.set(layer.batch_state_index, (mean.astype(x.dtype), var.astype(x.dtype)))
    state = state.set(layer.batch_counter, jnp.array(1))
    return _equinox_run(equinox.nn.inference_mode(layer), state, x)[0]


# -- haiku ---------------------------------------------------------------------------------------------------------------------------------


def _haiku(make: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A module called as a pure function; gives y and the state after it."""

    def call(x: Any, weight: Any, bias: Any, *, state: Any = None, **keywords: Any) -> tuple[Any, Any]:
        import haiku
        import jax

        first = dict.fromkeys(keywords, True)  # training, in which the state is made
        params, initial = haiku.transform_with_state(lambda a: make(haiku, a)(a, **first)).init(jax.random.PRNGKey(0), x)
        function = haiku.transform_with_state(lambda a: make(haiku, a)(a, **keywords))
        params = jax.tree_util.tree_map_with_path(lambda path, a: (weight if "scale" in str(path) else bias).reshape(a.shape), params)
        y, after = function.apply(params, initial if state is None else state(initial), None, x)
        return y, after

    return call


def _haiku_layer(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return _haiku(lambda hk, a: hk.LayerNorm(-1, True, True, eps))(x, weight, bias)[0]


def _haiku_rms(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return _haiku(lambda hk, a: hk.RMSNorm(-1, eps))(x, weight, bias)[0]


def _haiku_group(x: Any, weight: Any, bias: Any, eps: float, groups: int) -> Any:
    return _haiku(lambda hk, a: hk.GroupNorm(groups, eps=eps, data_format="channels_first"))(x, weight, bias)[0]


def _haiku_instance(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return _haiku(lambda hk, a: hk.InstanceNorm(True, True, eps=eps, data_format="channels_first"))(x, weight, bias)[0]


def _haiku_module(eps: float) -> Callable[[Any, Any], Any]:
    return lambda hk, a: hk.BatchNorm(True, True, 0.0, eps, data_format="channels_first")


def _haiku_batch(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    y, after = _haiku(_haiku_module(eps))(x, weight, bias, is_training=True)
    mean, var = (tree["average"] for _, tree in sorted(after.items()))
    return y, mean.reshape(-1), var.reshape(-1)


def _haiku_given(x: Any, weight: Any, bias: Any, eps: float, mean: Any, var: Any) -> Any:
    def state(initial: Any) -> Any:
        return {
            name: {k: (mean if "mean" in name else var).reshape(a.shape) if a.ndim else a for k, a in tree.items()}
            for name, tree in initial.items()
        }

    return _haiku(_haiku_module(eps))(x, weight, bias, is_training=False, state=state)[0]


HALVES = ("float32", "float16", "bfloat16")

SUBJECTS = (
    Subject(
        "flax",
        installed("flax", "jax"),
        _flax(True),
        _array,
        _values,
        HALVES,
        note="nnx, as it comes: use_fast_variance=True",
        advice="use_fast_variance=False; keep the statistics of BatchNorm in a layer of float32",
    ),
    Subject(
        "flax-two-pass",
        installed("flax", "jax"),
        _flax(False),
        _array,
        _values,
        HALVES,
        note="nnx with use_fast_variance=False",
        advice="in float16 give BatchNorm dtype=float32: the variance that is given is rounded to the layer's dtype",
    ),
    Subject(
        "equinox",
        installed("equinox", "jax"),
        {
            "layer_norm": _equinox_layer,
            "rms_norm": _equinox_rms,
            "group_norm": _equinox_group,
            "instance_norm": lambda x, weight, bias, eps: _equinox_group(x, weight, bias, eps, x.shape[1]),
            "batch_norm": _equinox_batch,
            STATISTICS: _equinox_given,
        },
        _array,
        _values,
        HALVES,
        note="vmap over the batch; instance_norm is GroupNorm with a group for each channel",
        advice="BatchNorm in float32: its statistics are of the layer's dtype",
    ),
    Subject(
        "haiku",
        installed("dm-haiku", "jax"),
        {
            "layer_norm": _haiku_layer,
            "rms_norm": _haiku_rms,
            "group_norm": _haiku_group,
            "instance_norm": _haiku_instance,
            "batch_norm": _haiku_batch,
            STATISTICS: _haiku_given,
        },
        _array,
        _values,
        HALVES,
        advice="normalize in float32; no BatchNorm in training on data that is not centred: subtract a common mean first",
    ),
)
