"""How numba lowers a function that only kernels call: to what LLVM reads, and no further.

numba has LLVM optimize every function and make machine code of it. Then it puts a copy into each function that calls it, and both is done
to the whole again. Nobody runs the first: without it the kernels of a recurrent layer take a third less of the processor's time to compile,
and the copies, which are optimized where they are called, are as fast.
"""

from __future__ import annotations

from typing import Any

from numba import _dynfunc
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(NativeLowering):  # type: ignore[misc]
    _name = "portnorm_lowering"

    def run_pass(self, state: Any) -> bool:
        """Numba's own, but for what its library does when it is complete."""
        library = state.library = state.targetctx.codegen().create_library(state.func_id.func_qualname)

        def finish() -> None:
            library._finalize_dynamic_globals()
            library._finalized = True

        library._optimize_final_module, library._finalize_final_module = (lambda: None), finish
        state.flags.no_compile = True
        changed: bool = super().run_pass(state)
        made = state["cr"]
        name, nowhere = made.fndesc.qualname.rpartition(".")[2], 0
        known = _dynfunc.make_function(made.fndesc.lookup_module(), name, "", nowhere, made.env, (library,))
        state.targetctx.insert_user_function(known, made.fndesc, [library])
        state["cr"] = made._replace(cfunc=known)
        return changed


class WithoutCode(CompilerBase):  # type: ignore[misc]
    """For `numba.njit(pipeline_class=…)`."""

    def define_pipelines(self) -> list[Any]:
        """Numba's own, with another way to lower."""
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        manager.passes = [(_Lowering if step is NativeLowering else step, text) for step, text in manager.passes]
        manager.finalize()
        return [manager]
