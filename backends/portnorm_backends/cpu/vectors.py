"""Loops over contiguous values, written as formulas of LLVM vectors of the full width of the processor's registers; compiled by numba.

`@elementwise` makes a loop of a formula, over several registers at a time, `@summed` the sums of what a formula gives. The last values,
fewer than a register has, are read and written under a mask, so that short rows have no rest of single values; numba's own loops get half
the width, and a rest of up to 31.

    @elementwise
    def memory(i, f, g, c):
        return (f * c + i * g,)

    memory(n, (i, f, g, c), (y,))       # inputs are vectors (n,) or single numbers, outputs vectors; an output may be an input

Vectors of uint16 are the bits of bfloat16: each is read as the float32 that it is the upper half of, and what is written there is rounded
once. The loop computes in float32.

Every operation rounds, as it must where differences are to cancel; `fused` is for where they are not, `product` for a term of a sum.
Nothing is reassociated but the lanes of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from portnorm_backends.cpu.places import BITS, INDEX, PLACE, Bits, Memory, ask, computed, mask_of, number_of, splat
from portnorm_backends.cpu.registers import WIDTH, has_avx512
from portnorm_backends.cpu.sums import TERMS

_AHEAD = 2**13
"""Bytes between what is read and what is asked for: measured 2 KB to 16 KB."""

_BESIDE = 4
"""Registers of each operand that a formula is computed for at once."""


@dataclass(frozen=True)
class Vector:
    """Values of some registers while code is generated; numbers on the other side stand for the same in every lane.

    An operation is done on one register after the other: a chain of them would wait for each result, but others are at hand meanwhile.
    """

    builder: Any
    registers: tuple[Any, ...]

    @property
    def value(self) -> Any:
        """That of the only register."""
        (value,) = self.registers
        return value

    def _each(self, make: Callable[..., Any], *others: Any) -> Vector:
        """What `make` makes of each register, with those of the others or their number."""
        return Vector(self.builder, tuple(make(r, *(self._at(k, other) for other in others)) for k, r in enumerate(self.registers)))

    def _at(self, k: int, other: Any) -> Any:
        return other.registers[k] if isinstance(other, Vector) else ir.Constant(self.kind, [float(other)] * self.kind.count)

    def __add__(self, other: Any) -> Vector:
        return self._each(self.builder.fadd, other)

    def __sub__(self, other: Any) -> Vector:
        return self._each(self.builder.fsub, other)

    def __mul__(self, other: Any) -> Vector:
        return self._each(self.builder.fmul, other)

    def __truediv__(self, other: Any) -> Vector:
        return self._each(self.builder.fdiv, other)

    def __radd__(self, other: Any) -> Vector:
        return self._each(lambda value, number: self.builder.fadd(number, value), other)

    def __rsub__(self, other: Any) -> Vector:
        return self._each(lambda value, number: self.builder.fsub(number, value), other)

    def __rtruediv__(self, other: Any) -> Vector:
        return self._each(lambda value, number: self.builder.fdiv(number, value), other)

    def __neg__(self) -> Vector:
        return self._each(self.builder.fneg)

    def root(self) -> Vector:
        """√x, rounded once."""
        name = f"llvm.sqrt.v{self.kind.count}f{32 if self.is_single else 64}"
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(self.kind, [self.kind]), name)
        return self._each(lambda value: self.builder.call(function, [value]))

    def clipped(self, limit: float) -> Vector:
        """Between −limit and limit; what is not a number stays."""
        found, builder = self, self.builder
        for sign, bound in (("<", -limit), (">", limit)):
            found = found._each(lambda x, edge, sign=sign: builder.select(builder.fcmp_ordered(sign, x, edge), edge, x), bound)
        return found

    def times_power_of_two(self, k: Vector) -> Vector:
        """x · 2ᵏ of whole k for which 2ᵏ is a normal number."""
        single, lanes, builder = self.is_single, self.kind.count, self.builder
        if has_avx512():
            return self._each(lambda x, k: _call(builder, f"mask.scalef.{_suffix(self)}", self.kind, x, k, *_unmasked(self), _NEAREST), k)
        whole, (bias, digits) = ir.VectorType(ir.IntType(32 if single else 64), lanes), (127, 23) if single else (1023, 52)

        def shifted(x: Any, k: Any) -> Any:
            exponent = builder.add(builder.fptosi(k, whole), ir.Constant(whole, [bias] * lanes))
            return builder.fmul(x, builder.bitcast(builder.shl(exponent, ir.Constant(whole, [digits] * lanes)), self.kind))

        return self._each(shifted, k)

    def same(self, number: float) -> Vector:
        """A number in every lane of as many registers."""
        return self._each(lambda _, constant: constant, number)

    @property
    def kind(self) -> Any:
        """The LLVM type of a register."""
        return self.registers[0].type

    @property
    def is_single(self) -> bool:
        """Whether the values are float32."""
        return type(self.kind.element) is ir.FloatType


def fused(a: Any, b: Vector, c: Any) -> Vector:
    """a · b + c, rounded once where the processor has an instruction for it."""
    builder = b.builder
    return b._each(lambda y, x, z: builder.fadd(builder.fmul(x, y, flags=_FUSED), z, flags=_FUSED), a, c)


def product(a: Vector, b: Vector) -> Vector:
    """a · b as a term of a sum, which may take it before it is rounded."""
    return a._each(lambda x, y: a.builder.fmul(x, y, flags=_FUSED), b)


_FUSED = ("contract",)
"""A product and a sum with this become one instruction where the processor has one."""


def reciprocal(x: Vector) -> Vector:
    """1 / x of a number that is neither 0 nor infinite.

    For float32 and AVX-512, whose division takes 16 cycles: r (2 − x r) of an approximation r of 14 bits, within 1 ULP of a normal number.
    """
    if not x.is_single or not has_avx512():
        return 1.0 / x
    r = x._each(lambda value: _call(x.builder, "rcp14.ps.512", x.kind, value, *_unmasked(x)))
    return fused(r, fused(-x, r, 1.0), r)


_NEAREST = ir.Constant(PLACE, 4)
"""Rounding as the processor is set to."""


def _suffix(x: Vector) -> str:
    return "ps.512" if x.is_single else "pd.512"


def _unmasked(x: Vector) -> tuple[Any, Any]:
    """What a masked instruction leaves in lanes that it does not write, and that it writes all."""
    return ir.Constant(x.kind, ir.Undefined), ir.Constant(ir.IntType(x.kind.count), -1)


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """An instruction of AVX-512 that LLVM has no other word for."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512.{name}"), arguments)


Formula = Callable[..., tuple[Vector, ...]]


class _Operands(NamedTuple):
    """The inputs of a loop: where vectors begin, and single numbers in every lane."""

    builder: Any
    lanes: int
    found: list[tuple[Memory | None, Any]]

    @classmethod
    def of(cls, context: Any, builder: Any, kind: Any, given: Any, dtype: Any) -> _Operands:
        """From a numba tuple of numbers and of vectors of type `dtype`, or of bits for which that is computed in."""
        lanes, found = WIDTH // (dtype.bitwidth // 8), list[tuple[Memory | None, Any]]()
        for k, t in enumerate(kind):
            one = builder.extract_value(given, k)
            if isinstance(t, types.Array):
                value = ir.VectorType(context.get_value_type(t.dtype), lanes)
                memory = (Bits if t.dtype == BITS else Memory)(builder, value, t.dtype.bitwidth // 8)
                found.append((memory, context.make_array(t)(context, builder, one).data))
            else:
                found.append((None, splat(builder, context.cast(builder, one, t, dtype), lanes)))
        return cls(builder, lanes, found)

    def at(self, i: Any, count: int = 1, mask: Any = None) -> list[Vector]:
        """Their `count` registers from value i on."""
        places = [self._place(i, k) for k in range(count)]
        return [
            Vector(self.builder, tuple(x if memory is None else memory.load(memory.at(x, place), mask) for place in places))
            for memory, x in self.found
        ]

    def write(self, i: Any, vectors: tuple[Vector, ...], mask: Any = None) -> None:
        """The vectors from value i on."""
        for (memory, start), vector in zip(self.found, vectors, strict=True):
            assert memory is not None
            for k, value in enumerate(vector.registers):
                memory.store(value, memory.at(start, self._place(i, k)), mask)

    def write_past(self, i: Any, vectors: tuple[Vector, ...]) -> None:
        """The same past the caches, where each begins with a register."""
        for (memory, start), vector in zip(self.found, vectors, strict=True):
            assert memory is not None
            for k, value in enumerate(vector.registers):
                memory.store_past(value, memory.at(start, self._place(i, k)))

    def ask(self, i: Any, count: int, ahead: int) -> None:
        """Ask for the `count` registers so many bytes after value i."""
        for memory, start in self.found:
            if memory is not None:
                for k in range(count):
                    ask(self.builder, memory.at(start, self.builder.add(self._place(i, k), ir.Constant(INDEX, ahead // memory.size))))

    def begin_with_registers(self) -> Any:
        """Whether each begins at a multiple of the size of a register."""
        found: Any = ir.Constant(ir.IntType(1), 1)
        for _, start in self.found:
            rest = self.builder.and_(self.builder.ptrtoint(start, INDEX), ir.Constant(INDEX, WIDTH - 1))
            found = self.builder.and_(found, self.builder.icmp_signed("==", rest, ir.Constant(INDEX, 0)))
        return found

    def _place(self, i: Any, k: int) -> Any:
        return self.builder.add(i, ir.Constant(INDEX, k * self.lanes))


def _loop(builder: Any, start: Any, stop: Any, step: int, body: Callable[[Any], None]) -> Any:
    """`body(i)` for i = start, start + step, … as long as i + step ≤ stop; the first i for which it is not."""
    head, inside, end = (builder.append_basic_block() for _ in range(3))
    entry = builder.block
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(INDEX)
    i.add_incoming(start, entry)
    after = builder.add(i, ir.Constant(INDEX, step))
    builder.cbranch(builder.icmp_signed("<=", after, stop), inside, end)
    builder.position_at_end(inside)
    body(i)
    i.add_incoming(after, builder.block)
    builder.branch(head)
    builder.position_at_end(end)
    return i


def _dtype(*kinds: Any) -> Any:
    """The type that a loop computes in, by the first vector."""
    return computed(next(t.dtype for kind in kinds for t in kind if isinstance(t, types.Array)))


def elementwise(formula: Formula) -> Any:
    """Decorator: `loop(n, inputs, outputs)` that writes what `formula` gives of the inputs into the outputs, n values of each."""

    @intrinsic  # type: ignore[untyped-decorator, unused-ignore]
    def loop(typing: Any, n: Any, inputs: Any, outputs: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _each(context, builder, formula, (inputs, outputs), args)
            return context.get_dummy_value()

        return types.void(types.int64, inputs, outputs), generate

    return loop


def asking(formula: Formula) -> Any:
    """Decorator: the same as `elementwise`, for rows that lie one behind the other: it asks for what comes `_AHEAD` bytes later."""

    @intrinsic  # type: ignore[untyped-decorator, unused-ignore]
    def loop(typing: Any, n: Any, inputs: Any, outputs: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _each(context, builder, formula, (inputs, outputs), args, ahead=_AHEAD)
            return context.get_dummy_value()

        return types.void(types.int64, inputs, outputs), generate

    return loop


def streamed(formula: Formula) -> Any:
    """Decorator: the same as `loop(n, inputs, outputs, past)`, which can write past the caches, where outputs begin with a cache line.

    Other threads see it after `settle`.
    """

    @intrinsic  # type: ignore[untyped-decorator, unused-ignore]
    def loop(typing: Any, n: Any, inputs: Any, outputs: Any, past: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _each(context, builder, formula, (inputs, outputs), args[:3], args[3])
            return context.get_dummy_value()

        return types.void(types.int64, inputs, outputs, types.boolean), generate

    return loop


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def settle(typing: Any) -> Any:
    """Wait for what was written past the caches."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _each(context: Any, builder: Any, formula: Formula, kinds: tuple[Any, Any], args: Any, past: Any = None, ahead: int = 0) -> None:
    """The loop of `elementwise`, where there is `past` of `streamed`, and with bytes `ahead` of `asking`."""
    (inputs, outputs), (n, given, made), dtype = kinds, args, _dtype(kinds[1])
    operands = _Operands.of(context, builder, inputs, given, dtype)
    results = _Operands.of(context, builder, outputs, made, dtype)
    lanes = operands.lanes
    if past is not None:
        past = builder.and_(results.begin_with_registers(), builder.icmp_signed("!=", past, ir.Constant(past.type, 0)))

    def some(i: Any, count: int = 1, mask: Any = None) -> None:
        if ahead:
            for own in (operands, results):
                own.ask(i, count, ahead)
        results.write(i, formula(*operands.at(i, count, mask)), mask)

    def several(i: Any) -> None:
        if past is None:
            some(i, _BESIDE)
            return
        found = formula(*operands.at(i, _BESIDE))
        with builder.if_else(past) as (then, otherwise):
            with then:
                results.write_past(i, found)
            with otherwise:
                results.write(i, found)

    i = _loop(builder, ir.Constant(INDEX, 0), n, _BESIDE * lanes, several)
    i = _loop(builder, i, n, lanes, some)
    with builder.if_then(builder.icmp_signed("<", i, n)):
        some(i, 1, mask_of(builder, builder.sub(n, i), lanes))


def summed(count: int) -> Callable[[Formula], Any]:
    """Decorator: `loop(n, inputs)` gives as float64 the `count` sums of what the formula gives; see `sums`."""
    return lambda formula: _summed(formula, count)


def _summed(formula: Formula, count: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator, unused-ignore]
    def loop(typing: Any, n: Any, inputs: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            dtype = _dtype(inputs)
            operands = _Operands.of(context, builder, inputs, args[1], dtype)
            lanes, vector = operands.lanes, ir.VectorType(context.get_value_type(dtype), operands.lanes)
            zero, turns = ir.Constant(vector, None), max(1, 8 // count)
            parts = [[cgutils.alloca_once_value(builder, zero) for _ in range(turns)] for _ in range(count)]
            totals = [(cgutils.alloca_once_value(builder, zero), cgutils.alloca_once_value(builder, zero)) for _ in range(count)]

            def body(i: Any, turn: int = 0, mask: Any = None) -> None:
                for part, value in zip(parts, formula(*operands.at(i, 1, mask)), strict=True):
                    term = value.value if mask is None else builder.select(mask, value.value, zero)
                    builder.store(builder.fadd(builder.load(part[turn]), term, flags=_FUSED), part[turn])

            def turns_of(i: Any) -> None:
                for turn in range(turns):
                    body(builder.add(i, ir.Constant(INDEX, turn * lanes)), turn)

            def carry() -> None:
                """Add the parts to the totals, so that they begin anew."""
                for part, (total, lost) in zip(parts, totals, strict=True):
                    _carry(builder, total, lost, _in_pairs(builder, [builder.load(turn) for turn in part]))
                    for turn in part:
                        builder.store(zero, turn)

            n, several = args[0], ir.Constant(INDEX, TERMS * turns * lanes)
            entry, some, again, end = (builder.block, *(builder.append_basic_block() for _ in range(3)))
            builder.branch(some)
            builder.position_at_end(some)
            start = builder.phi(INDEX)
            there = builder.add(start, several)
            stop = builder.select(builder.icmp_signed("<", there, n), there, n)
            i = _loop(builder, start, stop, turns * lanes, turns_of)
            i = _loop(builder, i, stop, lanes, body)
            with builder.if_then(builder.icmp_signed("<", i, stop)):
                body(i, 0, mask_of(builder, builder.sub(stop, i), lanes))
            builder.cbranch(builder.icmp_signed("<", stop, n), again, end)
            builder.position_at_end(again)
            carry()
            builder.branch(some)
            start.add_incoming(ir.Constant(INDEX, 0), entry)
            start.add_incoming(stop, again)
            builder.position_at_end(end)
            kind = ir.FunctionType(vector.element, [vector.element, vector])
            add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{lanes}f{dtype.bitwidth}")
            found = []
            for part, (total, _) in zip(parts, totals, strict=True):
                whole = builder.fadd(builder.load(total), _in_pairs(builder, [builder.load(turn) for turn in part]))
                one = builder.call(add, [ir.Constant(vector.element, -0.0), whole], fastmath=("reassoc",))
                found.append(context.cast(builder, one, dtype, types.float64))
            return context.make_tuple(builder, signature.return_type, found)

        return types.UniTuple(types.float64, count)(types.int64, inputs), generate

    return loop


def folded(count: int, ends: Formula) -> Callable[[Formula], Any]:
    """Decorator: `loop(n, columns, fixed, results)` that carries `count` registers through n columns, from 0 on.

    The formula is given a register of each of `columns` (matrices whose rows are registers), of `fixed` (vectors as long as a register, and
    numbers), and what has been carried so far, and returns what is. `ends` makes the results of what was carried and of `fixed`. Even and
    odd columns are carried apart.
    """
    return lambda formula: _folded(formula, count, ends)


def _folded(formula: Formula, count: int, ends: Formula) -> Any:
    @intrinsic  # type: ignore[untyped-decorator, unused-ignore]
    def loop(typing: Any, n: Any, columns: Any, fixed: Any, results: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            dtype = _dtype(results)
            size, zero = dtype.bitwidth // 8, ir.Constant(INDEX, 0)
            lanes = WIDTH // size
            kept = _Operands.of(context, builder, fixed, args[2], dtype).at(zero)
            outputs = _Operands.of(context, builder, results, args[3], dtype)
            memory = Memory(builder, ir.VectorType(context.get_value_type(dtype), lanes), size)
            moving = [context.make_array(t)(context, builder, builder.extract_value(args[1], k)).data for k, t in enumerate(columns)]
            none = ir.Constant(memory.vector, None)
            parts = [[cgutils.alloca_once_value(builder, none) for _ in range(count)] for _ in range(2)]

            def one(j: Any, turn: int) -> None:
                place = builder.mul(j, ir.Constant(INDEX, lanes))
                given = [Vector(builder, (memory.load(memory.at(start, place)),)) for start in moving]
                before = [Vector(builder, (builder.load(part),)) for part in parts[turn]]
                for part, vector in zip(parts[turn], formula(*given, *kept, *before), strict=True):
                    builder.store(vector.value, part)

            def two(j: Any) -> None:
                one(j, 0)
                one(builder.add(j, ir.Constant(INDEX, 1)), 1)

            for part in (*parts[0], *parts[1]):
                builder.store(none, part)
            j = _loop(builder, zero, args[0], 2, two)
            with builder.if_then(builder.icmp_signed("<", j, args[0])):
                one(j, 0)
            totals = [builder.fadd(builder.load(even), builder.load(odd)) for even, odd in zip(*parts, strict=True)]
            outputs.write(zero, ends(*(Vector(builder, (total,)) for total in totals), *kept))
            return context.get_dummy_value()

        return types.void(types.int64, columns, fixed, results), generate

    return loop


def across(formula: Formula) -> Any:
    """Decorator: `loop(rows, vectors, numbers, outputs)` over all rows of matrices at once, a register of columns after the other.

    The formula is given a register of each of `rows` (matrices), of `vectors` (a value for each column) and of `numbers` (a value for each
    row), and returns what is written to the `outputs` (matrices).
    """

    @intrinsic  # type: ignore[untyped-decorator, unused-ignore]
    def loop(typing: Any, rows: Any, vectors: Any, numbers: Any, outputs: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            dtype = _dtype(numbers)
            zero, lanes = ir.Constant(INDEX, 0), WIDTH // (dtype.bitwidth // 8)
            read, written = (_Matrices.of(context, builder, kind, given, lanes) for kind, given in ((rows, args[0]), (outputs, args[3])))
            along = _Operands.of(context, builder, vectors, args[1], dtype)
            each = [context.make_array(t)(context, builder, builder.extract_value(args[2], k)).data for k, t in enumerate(numbers)]
            count, n = written.shape

            def columns(j: Any, mask: Any = None) -> None:
                fixed = along.at(j, 1, mask)

                def row(k: Any) -> None:
                    own = [Vector(builder, (splat(builder, builder.load(builder.gep(start, [k])), lanes),)) for start in each]
                    written.write(k, j, formula(*read.at(k, j, mask), *fixed, *own), mask)

                _loop(builder, zero, count, 1, row)

            j = _loop(builder, zero, n, lanes, columns)
            with builder.if_then(builder.icmp_signed("<", j, n)):
                columns(j, mask_of(builder, builder.sub(n, j), lanes))
            return context.get_dummy_value()

        return types.void(rows, vectors, numbers, outputs), generate

    return loop


class _Matrices(NamedTuple):
    """Matrices of which each row is contiguous."""

    builder: Any
    shape: tuple[Any, Any]  # of the first
    found: list[tuple[Memory, Any, Any]]  # how to read, where it begins, and how many bytes from one row to the next

    @classmethod
    def of(cls, context: Any, builder: Any, kind: Any, given: Any, lanes: int) -> _Matrices:
        """From a numba tuple of arrays."""
        found, shapes = list[tuple[Memory, Any, Any]](), []
        for k, t in enumerate(kind):
            array = context.make_array(t)(context, builder, builder.extract_value(given, k))
            value = ir.VectorType(context.get_value_type(t.dtype), lanes)
            memory = (Bits if t.dtype == BITS else Memory)(builder, value, t.dtype.bitwidth // 8)
            found.append((memory, array.data, builder.extract_value(array.strides, 0)))
            shapes.append(tuple(builder.extract_value(array.shape, axis) for axis in range(2)))
        return cls(builder, shapes[0], found)

    def _row(self, start: Any, stride: Any, k: Any) -> Any:
        place = self.builder.gep(self.builder.bitcast(start, ir.IntType(8).as_pointer()), [self.builder.mul(k, stride)])
        return self.builder.bitcast(place, start.type)

    def at(self, k: Any, j: Any, mask: Any = None) -> list[Vector]:
        """The register of each from column j on in row k."""
        return [
            Vector(self.builder, (memory.load(memory.at(self._row(start, stride, k), j), mask),)) for memory, start, stride in self.found
        ]

    def write(self, k: Any, j: Any, vectors: tuple[Vector, ...], mask: Any = None) -> None:
        """A register for each there."""
        for (memory, start, stride), vector in zip(self.found, vectors, strict=True):
            memory.store(vector.value, memory.at(self._row(start, stride, k), j), mask)


def _in_pairs(builder: Any, values: list[Any]) -> Any:
    """Their sum."""
    while len(values) > 1:
        values = [builder.fadd(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _carry(builder: Any, total: Any, lost: Any, part: Any) -> None:
    """`sums.carried` of vectors, at places in memory."""
    before = builder.load(total)
    term = builder.fsub(part, builder.load(lost))
    more = builder.fadd(before, term)
    rest = builder.fsub(builder.fsub(more, before), term)
    builder.store(more, total)
    builder.store(builder.select(builder.fcmp_ordered("==", rest, rest), rest, ir.Constant(rest.type, None)), lost)


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def prefetch(typing: Any, row: Any) -> Any:
    """Ask for the memory of a contiguous row that is read soon: the processor itself sees no pattern in rows that are short."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(row)(context, builder, args[0])
        start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
        size = builder.mul(builder.extract_value(array.shape, 0), array.itemsize)
        _loop(builder, ir.Constant(INDEX, 0), size, 64, lambda i: ask(builder, builder.gep(start, [i])))
        return context.get_dummy_value()

    return types.void(row), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def leading(typing: Any, row: Any) -> Any:
    """The first value of a row, as a number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(context.make_array(row)(context, builder, args[0]).data)
        return number_of(builder, value) if row.dtype == BITS else value

    return computed(row.dtype)(row), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def like(typing: Any, row: Any, number: Any) -> Any:
    """A number in the type that loops over a row compute in."""
    kind = computed(row.dtype)
    return kind(row, number), lambda context, builder, signature, args: context.cast(builder, args[1], number, kind)
