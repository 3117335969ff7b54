"""One call of a kernel that several threads compute: whoever has computed a range of its rows takes the next, until none is left.

None of that needs the interpreter, whose lock a thread would wait for longer than many a kernel runs. A thread that helps (`threads`)
listens for a while after each call, and then sleeps. Each has a line of the board to itself, by which it is told:

    asleep ─ it begins to listen ─> listens ─ a caller takes it ─> claimed ─ and says for which job ─> given ─ it begins ─> at work
       ^                             ^   │                                                               │                     │
       └──────── nobody came ────────┼───┘                                                               │                     │
                                     ├──── the caller, who has nothing left to compute, takes it back ───┘                     │
                                     └───────────────────────────────── nothing is left ───────────────────────────────────────┘

One that sleeps, but was woken, is taken as well, and finds its job when it comes. A job lies on the stack of its caller, who waits for the
threads at work, and for no other. Who begins to listen in the middle of a call is told between two ranges.

A kernel that is shared takes arrays of which each range has its rows, those of which it has one entry for itself, and what all have;
where none is parted, the first row of the range and that after its last, and what all have.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from portnorm_backends.cpu import threads
from portnorm_backends.cpu.compiling import address_of, compiled
from portnorm_backends.cpu.places import INDEX, PLACE
from portnorm_backends.cpu.threads import ASLEEP, BEFORE, CLAIMED, GIVEN, JOB, LEAVE, LISTENS, ROUSED, STATE, WORKS

_BYTE = ir.IntType(8).as_pointer()
_WORDS = INDEX.as_pointer()
_WORK = ir.FunctionType(INDEX, [_BYTE, INDEX, INDEX, INDEX])
"""What computes a range: where the arguments of the call lie, the number of the range, its first row, and that after its last."""

_CALL, _ARGUMENTS, _NEXT, _STEP, _TOTAL, _HANDED, _BUSY, _FINE, _FIELDS = range(9)
"""The words of a job.

What computes a range of it and where its arguments lie; the next range that nobody has taken, the rows of a range and of all; how many
threads were told of it, how many of them are not done with it, and as bits whether every range came out right, and came to its end.
"""

_LISTENING = 256
"""Looks at the board before a thread sleeps, some 200 microseconds: a pause of the processor lasts 10 to 50 ns, and to let others go first
a third of a microsecond.
"""

_PAUSES = 16
"""Pauses of the processor after which others, such as the threads of NumPy's BLAS, may go first."""


def _n(number: int) -> Any:
    return ir.Constant(INDEX, number)


class _Words(NamedTuple):
    """Words in memory that several threads read and write."""

    builder: Any
    start: Any

    def _at(self, field: int) -> Any:
        return self.builder.gep(self.start, [_n(field)])

    def read(self, field: int) -> Any:
        """Its value, and sees what was written before that was."""
        return self.builder.load_atomic(self._at(field), "acquire", 8)

    def write(self, field: int, value: Any) -> None:
        """Whoever reads this sees what was written before."""
        self.builder.store_atomic(value, self._at(field), "release", 8)

    def add(self, field: int, number: Any) -> Any:
        """Its value before that."""
        return self.builder.atomic_rmw("add", self._at(field), number, "acq_rel")

    def keep(self, field: int, bits: Any) -> None:
        """Only these bits of it."""
        self.builder.atomic_rmw("and", self._at(field), bits, "acq_rel")

    def turn(self, field: int, old: Any, new: int) -> Any:
        """Whether it was `old` and is `new` now."""
        return self.builder.extract_value(self.builder.cmpxchg(self._at(field), old, _n(new), "acq_rel", "acquire"), 1)

    def line(self, k: Any) -> _Words:
        """A line of the board."""
        return _Words(self.builder, self.builder.gep(self.start, [self.builder.mul(k, _n(threads.LINE))]))


def _function(module: Any, name: str, kind: Any, fill: Callable[[Any, Any], None]) -> Any:
    """A function of a module, which `fill` writes when it is first asked for."""
    name = f"portnorm_{name}"
    if name not in module.globals:
        function = ir.Function(module, kind, name)
        function.linkage = "internal"
        fill(ir.IRBuilder(function.append_basic_block()), function)
    return module.globals[name]


def _pause(builder: Any) -> None:
    """Wait for some cycles, where the processor has an instruction for that."""
    nothing, machine = ir.VoidType(), platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(nothing, []), "llvm.x86.sse2.pause"), [])
    elif machine in ("aarch64", "arm64"):
        kind = ir.FunctionType(nothing, [PLACE])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint"), [ir.Constant(PLACE, 1)])


def _wait_a_little(builder: Any) -> None:
    """A look's time, at the end of which other threads may go first."""
    with cgutils.for_range(builder, _n(_PAUSES)):
        _pause(builder)
    if llvmlite.binding.address_of_symbol("sched_yield"):
        builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(PLACE, []), "sched_yield"), [])


def _compute_one(builder: Any, function: Any) -> None:
    """Take a range of a job and compute it; whether there was one."""
    job = _Words(builder, function.args[0])
    number, step, total = job.add(_NEXT, _n(1)), job.read(_STEP), job.read(_TOTAL)
    first = builder.mul(number, step)
    with builder.if_then(builder.icmp_signed("<", first, total)):
        last = builder.add(first, step)
        last = builder.select(builder.icmp_signed("<", last, total), last, total)
        work, arguments = (builder.inttoptr(job.read(f), kind) for f, kind in ((_CALL, _WORK.as_pointer()), (_ARGUMENTS, _BYTE)))
        job.keep(_FINE, builder.call(work, [arguments, number, first, last]))
        builder.ret(ir.Constant(ir.IntType(1), True))
    builder.ret(ir.Constant(ir.IntType(1), False))


def _one_more(builder: Any, job: Any) -> Any:
    one = _function(builder.module, "compute_one", ir.FunctionType(ir.IntType(1), [_WORDS]), _compute_one)
    return builder.call(one, [job])


def _hand_out(builder: Any, function: Any) -> None:
    """Tell of a job those who listen or will in a moment, and no more of them than it is to have."""
    lines, wanted, (board, job) = function.args[1], function.args[2], (_Words(builder, function.args[k]) for k in (0, 3))
    with cgutils.for_range(builder, lines) as each:
        line = board.line(each.index)
        more = builder.icmp_signed("<", job.read(_HANDED), wanted)
        before = line.read(STATE)
        listens, sleeps = (builder.icmp_signed("==", before, _n(state)) for state in (LISTENS, ASLEEP))
        comes = builder.and_(sleeps, builder.icmp_signed("!=", line.read(ROUSED), _n(0)))
        with builder.if_then(builder.and_(more, builder.or_(listens, comes))), builder.if_then(line.turn(STATE, before, CLAIMED)):
            line.write(BEFORE, before)
            line.write(JOB, builder.ptrtoint(function.args[3], INDEX))
            job.add(_HANDED, _n(1))
            job.add(_BUSY, _n(1))
            line.write(STATE, _n(GIVEN))
    builder.ret_void()


def _take_back(builder: Any, function: Any) -> None:
    """The same threads, those that have not begun."""
    lines, (board, job), own = function.args[1], (_Words(builder, function.args[k]) for k in (0, 2)), function.args[2]

    def has(line: _Words) -> Any:
        return builder.icmp_signed("==", line.read(JOB), builder.ptrtoint(own, INDEX))

    with cgutils.for_range(builder, lines) as each:
        line = board.line(each.index)
        given = builder.icmp_signed("==", line.read(STATE), _n(GIVEN))
        with builder.if_then(builder.and_(given, has(line))), builder.if_then(line.turn(STATE, _n(GIVEN), CLAIMED)):
            own_still = has(line)  # in the meantime it may have been given another's
            job.add(_BUSY, builder.sext(own_still, INDEX))
            line.write(STATE, builder.select(own_still, line.read(BEFORE), _n(GIVEN)))
    builder.ret_void()


def _while(builder: Any, condition: Callable[[], Any], body: Callable[[], None]) -> None:
    """A loop."""
    again, inside, after = (builder.append_basic_block() for _ in range(3))
    builder.branch(again)
    builder.position_at_end(again)
    builder.cbranch(condition(), inside, after)
    builder.position_at_end(inside)
    body()
    builder.branch(again)
    builder.position_at_end(after)


# -- a caller ----------------------------------------------------------------------------------------------------------------------------


def _part(context: Any, builder: Any, kind: Any, value: Any, start: Any, stop: Any, entry: bool) -> Any:
    """Rows `start` to before `stop` of an array, as far as it has them; or entry `start` of it, as an array."""
    found = types.Array(kind.dtype, kind.ndim - entry, kind.layout, readonly=not kind.mutable)
    given, made = context.make_array(kind)(context, builder, value), context.make_array(found)(context, builder)
    shape, strides = (cgutils.unpack_tuple(builder, a, kind.ndim) for a in (given.shape, given.strides))
    data = builder.bitcast(cgutils.pointer_add(builder, given.data, builder.mul(start, strides[0])), given.data.type)
    if not entry:
        start, stop = (builder.select(builder.icmp_signed("<", k, shape[0]), k, shape[0]) for k in (start, stop))
        shape = [builder.sub(stop, start), *shape[1:]]
    populate_array(made, data, shape[entry:], strides[entry:], given.itemsize, None)
    return made._getvalue()


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _call(typing: Any, board: Any, lines: Any, helpers: Any, step: Any, total: Any, address: Any, parted: Any, own: Any, whole: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        board, lines, helpers, step, total, address, *groups = args
        values, kinds = [address], [*parted, *own, *whole]
        for group, kind in zip(groups, (parted, own, whole), strict=True):
            values += cgutils.unpack_tuple(builder, group, len(kind))
        arguments = cgutils.pack_struct(builder, values)
        place = cgutils.alloca_once_value(builder, arguments)
        work = ir.Function(builder.module, _WORK, builder.module.get_unique_name("portnorm_range"))
        work.linkage = "internal"
        _compute(context, work, arguments.type, kinds, len(parted), len(own))
        start = builder.bitcast(cgutils.alloca_once(builder, ir.ArrayType(INDEX, _FIELDS)), _WORDS)
        job, board = _Words(builder, start), builder.inttoptr(board, _WORDS)
        given = {_CALL: builder.ptrtoint(work, INDEX), _ARGUMENTS: builder.ptrtoint(place, INDEX), _STEP: step, _TOTAL: total, _FINE: _n(3)}
        for field in range(_FIELDS):
            job.write(field, given.get(field, _n(0)))
        nothing = ir.VoidType()
        hand_out = _function(builder.module, "hand_out", ir.FunctionType(nothing, [_WORDS, INDEX, INDEX, _WORDS]), _hand_out)
        take_back = _function(builder.module, "take_back", ir.FunctionType(nothing, [_WORDS, INDEX, _WORDS]), _take_back)

        def told() -> None:
            builder.call(hand_out, [board, lines, helpers, start])

        told()
        _while(builder, lambda: _one_more(builder, start), told)

        def gather() -> None:
            """Once more in each turn: while one caller looks at a line, it is hidden from the other."""
            builder.call(take_back, [board, lines, start])
            _wait_a_little(builder)

        builder.call(take_back, [board, lines, start])
        _while(builder, lambda: builder.icmp_signed("!=", job.read(_BUSY), _n(0)), gather)
        return job.read(_FINE)

    return types.int64(*(types.int64,) * 6, parted, own, whole), generate


def _compute(context: Any, work: Any, kind: Any, kinds: list[Any], parted: int, own: int) -> None:
    """Compute a range: call the kernel with what it has of the arrays."""
    builder = ir.IRBuilder(work.append_basic_block())
    place, number, first, last = work.args
    address, *values = cgutils.unpack_tuple(builder, builder.load(builder.bitcast(place, kind.as_pointer())), 1 + len(kinds))
    given, seen = [], []
    if not parted:
        given, seen = [first, last], [types.int64, types.int64]
    for k, (value, of) in enumerate(zip(values, kinds, strict=True)):
        if k < parted:
            value = _part(context, builder, of, value, first, last, False)
        elif k < parted + own:
            value = _part(context, builder, of, value, number, number, True)
            of = types.Array(of.dtype, of.ndim - 1, of.layout, readonly=not of.mutable)
        given.append(value)
        seen.append(of)
    conventions = context.call_conv
    function = builder.inttoptr(address, conventions.get_function_type(types.boolean, seen).as_pointer())
    status, fine = conventions.call_function(builder, function, types.boolean, seen, given)
    builder.ret(builder.or_(builder.zext(fine, INDEX), builder.shl(builder.zext(status.is_ok, INDEX), _n(1))))


def _shared(
    board: int, lines: int, helpers: int, step: int, total: int, address: int, parted: Any, own: Any, whole: Any
) -> int:  # compiled for the arguments of each kernel
    found: int = _call(board, lines, helpers, step, total, address, parted, own, whole)
    return found


class _Shared(NamedTuple):
    compute: Callable[..., int]
    address: int  # of the kernel


_kernels: dict[Any, tuple[int, int]] = {}


def shared(kernel: Any, parted: int = 0, own: int = 0) -> Any:
    """The kernel, which `call` can share from now on: it takes so many arrays of which ranges have their rows, so many of which each range
    has an entry, and what all have; and says whether it was right.
    """
    _kernels[kernel] = parted, own
    return kernel


def prepare() -> None:
    """Compile what the first `call` of each kernel would."""
    for kernel in list(_kernels):
        _made(kernel)


@functools.cache
def _made(kernel: Any) -> _Shared:
    parted, own = _kernels[kernel]
    ((given, _),) = ((s.args, s.return_type) for s in kernel.nopython_signatures)
    if not parted:
        given = given[2:]
    apart = tuple(types.Array(a.dtype, a.ndim + 1, a.layout, readonly=not a.mutable) for a in given[parted : parted + own])
    groups = (types.Tuple(given[:parted]), types.Tuple(apart), types.Tuple(given[parted + own :]))
    made: Any = compiled(signatures=types.int64(*(types.int64,) * 6, *groups))(_shared)
    (overload,) = made.overloads.values()
    threads.listen_by(_listening())
    return _Shared(overload.entry_point, address_of(kernel))


def call(
    kernel: Any, plan: threads.Plan, total: int, parted: tuple[Any, ...] = (), own: tuple[Any, ...] = (), whole: tuple[Any, ...] = ()
) -> bool:
    """The kernel over all rows, in the ranges of a plan; whether it was right in each."""
    assert all(len(a) >= plan.ranges for a in own)
    compute, address = _made(kernel)
    board, lines = threads.board_for(plan)
    found = compute(board, lines, plan.threads - 1, plan.step, total, address, parted, own, whole)
    if not found & 2:
        raise MemoryError(f"no memory for {plan.ranges} ranges of {total} rows")
    return bool(found & 1)


# -- a thread that helps -----------------------------------------------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _listen(typing: Any, place: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line, looks = _Words(builder, builder.inttoptr(args[0], _WORDS)), cgutils.alloca_once_value(builder, _n(0))
        goes = cgutils.alloca_once_value(builder, ir.Constant(ir.IntType(1), False))
        line.write(ROUSED, _n(0))

        def look() -> None:
            state = line.read(STATE)
            with builder.if_then(builder.icmp_signed("==", state, _n(ASLEEP))):
                line.turn(STATE, _n(ASLEEP), LISTENS)
            with builder.if_else(builder.icmp_signed("==", state, _n(GIVEN))) as (to_compute, nothing):
                with to_compute, builder.if_then(line.turn(STATE, _n(GIVEN), WORKS)):
                    start = builder.inttoptr(line.read(JOB), _WORDS)
                    _while(builder, lambda: _one_more(builder, start), lambda: None)
                    line.write(STATE, _n(LISTENS))
                    _Words(builder, start).add(_BUSY, _n(-1))  # the last that is done with the job, whose caller may go then
                    builder.store(_n(0), looks)
                with nothing:
                    _wait_a_little(builder)
                    count = builder.add(builder.load(looks), _n(1))
                    builder.store(count, looks)
                    enough = builder.icmp_signed(">=", count, _n(_LISTENING))
                    asked = builder.icmp_signed("!=", line.read(LEAVE), _n(0))
                    with builder.if_then(builder.or_(enough, asked)):
                        builder.store(line.turn(STATE, _n(LISTENS), ASLEEP), goes)

        _while(builder, lambda: builder.not_(builder.load(goes)), look)
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _listened(place: int) -> None:
    """Listen at a line of the board, and help whoever asks, until nobody has for a while or the line says to leave."""
    _listen(place)


@functools.cache
def _listening() -> Callable[[int], None]:
    made: Any = compiled(signatures=types.void(types.int64))(_listened)
    (overload,) = made.overloads.values()
    listen: Callable[[int], None] = overload.entry_point
    return listen
