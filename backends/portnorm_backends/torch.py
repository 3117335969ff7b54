"""torch: one `torch.autograd.Function` for every Op and layer, whose backward is the hand-written vjp.

Its graph then has one node for a call, which keeps the residuals and nothing else. Under `torch.compile` a recurrent layer is one node of
the compiled graph (`torch_compiled.py`). There everything else, and all that `torch.export` or the transforms of `torch.func` see, is the
definition itself; where time is open in an exported program, its loop is torch's own operator (`torch_loop.py`).
"""

from __future__ import annotations

from typing import Any

import array_api_compat.torch
import torch

from portnorm.arrays import Array, Autodiff, Differentiable, Kernel, Library, leaves
from portnorm.errors import UnsupportedError
from portnorm_backends import torch_compiled, torch_loop, torch_plain
from portnorm_backends.flat import cotangents_of_call, put_together, taken_apart


class _Recorded(torch.autograd.Function):  # type: ignore[misc]
    """`forward(function, form, *arrays)` gives the form of the value and then its arrays; `form` is that of `(args, attrs)`."""

    @staticmethod
    def forward(ctx: Any, function: Differentiable, form: Any, *arrays: Array) -> tuple[Any, ...]:
        args, attrs = put_together(form, arrays)
        value, residuals = function.forward(*args, **attrs)
        outputs, form_of_value = taken_apart(value, torch.is_tensor)
        kept, form_of_kept = taken_apart((residuals, attrs), torch.is_tensor)
        ctx.save_for_backward(*kept)
        ctx.function, ctx.forms = function, (form, form_of_value, form_of_kept)
        ctx.mark_non_differentiable(*(a for a in outputs if not a.is_floating_point()))
        return form_of_value, *outputs

    @staticmethod
    def backward(ctx: Any, _: None, *given: Array) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise torch_compiled.second_derivative()
        form, form_of_value, form_of_kept = ctx.forms
        residuals, attrs = put_together(form_of_kept, ctx.saved_tensors)
        needed = ctx.needs_input_grad[2:]
        cotangents = ctx.function.vjp(residuals, put_together(form_of_value, given), **attrs)
        found = cotangents_of_call(form, cotangents, needed.__getitem__)
        return None, None, *(found.get(k) if needed[k] else None for k in range(len(needed)))


def _is_followed() -> bool:
    """Whether somebody follows the operations one by one now, to compile, transform or trace them."""
    return bool(torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing())


def _records(args: Any) -> bool:
    """Whether autograd records now. `torch.compile`, `torch.func` and `torch.jit.trace` follow the operations of the definition instead."""
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
    ):
        return False
    return any(torch.is_tensor(a) and a.requires_grad for a in leaves(args))


def _unrolls(layer: Any) -> bool:
    """Under `torch.export` the definition is followed, so that a program runs where portnorm is not installed; and what `torch.func`
    transforms is followed, since a node has none of its rules but the reverse one."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
        return False
    return torch_compiled.is_told(layer)


def _call(function: Differentiable, args: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():  # and `unrolls` was asked
        return torch_compiled.call(function, args)
    if attrs.get("out") is not None:
        raise UnsupportedError("`out` cannot take a result that autograd records; leave it out, or call under torch.no_grad()")
    arrays, form = taken_apart((args, attrs), torch.is_tensor)
    form_of_value, *outputs = _Recorded.apply(function, form, *arrays)
    return put_together(form_of_value, outputs)


def _is_concrete(x: Any) -> bool:
    if _is_followed():
        return False
    return bool(x.device.type != "meta")


def _is_passing(x: Any) -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)


def _sigmoid(x: Array) -> tuple[Array, tuple[Array]]:
    y = torch.sigmoid(x)
    return y, (y,)


def _steps_so_far(mask: Array) -> Array:
    """What array-api-compat calls for it, torch.compile does not follow without a warning."""
    return torch.cumsum(mask, dim=0)


def _draws(rng: Any, shapes: list[tuple[int, ...]], x: Array) -> list[Array] | None:
    if not isinstance(rng, torch.Generator):
        return None
    return [torch.rand(shape, generator=rng, device=rng.device).to(x.device) for shape in shapes]


def _steps_at(x: Array, place: Array) -> Array:
    """What array-api-compat calls for it, torch.export fixes the lengths of."""
    return torch.gather(x, 0, place[:, :, None].expand(x.shape))


def _rows_added(rows: Array, ids: Array, *, entries: int) -> Array:
    return torch.zeros((entries, rows.shape[1]), dtype=rows.dtype, device=rows.device).index_add(0, ids, rows)


def _to_numpy(x: Array) -> Any:
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


LIBRARY = Library(
    "torch",
    kernels={
        "loop": Kernel(call=torch_loop.loop, accepts=torch_loop.is_followed),
        "normalize": Kernel(call=torch_plain.call, forward=torch_plain.forward, accepts=torch_plain.accepts),
        "sigmoid": Kernel(call=torch.sigmoid, forward=_sigmoid),
        "steps_so_far": Kernel(call=_steps_so_far),
        # One operator, which backends of phones take; of a transposed matrix and a product they take neither.
        "times_transposed": Kernel(call=torch.nn.functional.linear, accepts=lambda x, weight: torch_plain.is_followed()),
        "steps_at": Kernel(call=_steps_at),
        "rows_added": Kernel(call=_rows_added),
    },
    is_concrete=_is_concrete,
    autodiff=Autodiff(_records, _call, constant=lambda x: x.detach(), is_passing=_is_passing, unrolls=_unrolls),
    namespace=array_api_compat.torch,
    device=lambda x: x.device,
    draws=_draws,
    to_numpy=_to_numpy,
)
