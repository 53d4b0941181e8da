"""
Vectors of 8 numbers for Numba's loops: the compiler is told which numbers to work on at once, and need not find out.

The compiler vectorises a loop over arrays only where it can prove that it may. Each of these is enough to stop it:
indices that could be negative (Numba lets them wrap around), arrays that could overlap, and maxima of numbers that
could be NaN. Here load and store read and write a row of D numbers, D a multiple of 8, without any of that, and the
numbers stay in registers between.

    Vector      8 float32 or 8 float64; + - * / and the functions below take vectors of one type
    load, store at an index of a one-dimensional contiguous array: no wrap-around; NUMBA_BOUNDSCHECK=1 checks the index
    splat       a scalar in all 8 places                    madd        a b + c
    total       the sum of the 8 numbers                    largest     the larger of each pair; of NaN, the second
    peak        the largest of the 8 numbers, NaN aside
    exp2        2^x, as loops.exp2_f32 for float32          distance    |a - b|
    floor       of each number                              root        the square root of each number
    cast        to an array's dtype                         select      x where a > b, else y
"""

import operator

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model

from kernels.loops import BOUNDSCHECK, inner_loop

WIDTH = 8
FLAGS = ("contract", "reassoc", "nsz", "arcp")


class Vector(types.Type):
    """The type of 8 numbers of a dtype, types.float32 or types.float64."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(f"Vector({dtype})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, ir.VectorType(manager[vector.dtype].get_value_type(), WIDTH))


def _pointer(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    vector = ir.VectorType(context.get_value_type(array_type.dtype), WIDTH)
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _bytes(array_type) -> int:
    return array_type.dtype.bitwidth // 8


@intrinsic
def _load(typing, x, i):
    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], *arguments)
        return builder.load(pointer, align=_bytes(signature.args[0]))
    return Vector(x.dtype)(x, types.intp), generate


@intrinsic
def _store(typing, x, i, v):
    def generate(context, builder, signature, arguments):
        array, index, vector = arguments
        pointer = _pointer(context, builder, signature.args[0], array, index)
        builder.store(vector, pointer, align=_bytes(signature.args[0]))
        return context.get_dummy_value()
    return types.void(x, types.intp, Vector(x.dtype)), generate


@inner_loop
def _checked_load(x, i):
    if i < 0 or i + 8 > x.size:
        raise IndexError("a vector is read outside its array")
    return _load(x, i)


@inner_loop
def _checked_store(x, i, v):
    if i < 0 or i + 8 > x.size:
        raise IndexError("a vector is written outside its array")
    _store(x, i, v)


load, store = (_checked_load, _checked_store) if BOUNDSCHECK else (_load, _store)


@intrinsic
def splat(typing, x):
    """Returns the vector with x in all 8 places."""
    def generate(context, builder, signature, arguments):
        vector = ir.VectorType(arguments[0].type, WIDTH)
        undefined = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(undefined, arguments[0], ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
        return builder.shuffle_vector(first, undefined, zeros)
    return Vector(x)(x), generate


def _pairwise(name, build):
    """Returns an intrinsic of two vectors of one type; build(builder, a, b) makes its instructions."""
    def typed(typing, a, b):
        if not isinstance(a, Vector) or a != b:
            return None
        return a(a, b), lambda context, builder, signature, arguments: build(builder, *arguments)
    typed.__name__ = name
    return intrinsic(typed)


def _call(builder, name, *vectors):
    """Calls LLVM's function `name` of vectors of one type, which returns another."""
    kind = vectors[0].type
    element = "f32" if isinstance(kind.element, ir.FloatType) else "f64"
    signature = ir.FunctionType(kind, [kind] * len(vectors))
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.{name}.v{WIDTH}{element}")
    return builder.call(function, vectors, fastmath=FLAGS)


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


_add = _pairwise("_add", lambda builder, a, b: builder.fadd(a, b, flags=FLAGS))
_subtract = _pairwise("_subtract", lambda builder, a, b: builder.fsub(a, b, flags=FLAGS))
_multiply = _pairwise("_multiply", lambda builder, a, b: builder.fmul(a, b, flags=FLAGS))
_divide = _pairwise("_divide", lambda builder, a, b: builder.fdiv(a, b, flags=FLAGS))
largest = _pairwise("largest", _larger)
distance = _pairwise("distance", lambda builder, a, b: _call(builder, "fabs", builder.fsub(a, b)))


def _operate(symbol, function):
    @overload(symbol)
    def operation(a, b):
        if isinstance(a, Vector) and a == b:
            return lambda a, b: function(a, b)


_operate(operator.add, _add)
_operate(operator.sub, _subtract)
_operate(operator.mul, _multiply)
_operate(operator.truediv, _divide)


@intrinsic
def madd(typing, a, b, c):
    """Returns a b + c."""
    if not a == b == c:
        return None
    return a(a, b, c), lambda context, builder, signature, arguments: _call(builder, "fmuladd", *arguments)


@intrinsic
def select(typing, a, b, x, y):
    """Returns x where a > b, else y."""
    def generate(context, builder, signature, arguments):
        a, b, x, y = arguments
        return builder.select(builder.fcmp_ordered(">", a, b), x, y)
    return x(a, b, x, y), generate


def _reduction(name, arguments):
    """
    Returns an intrinsic that makes one number of 8 by LLVM's reduction of this name. arguments(element) makes what the
    reduction takes before the vector.
    """
    def typed(typing, a):
        def generate(context, builder, signature, vectors):
            kind = vectors[0].type
            before = arguments(kind.element)
            element = "f32" if isinstance(kind.element, ir.FloatType) else "f64"
            signature = ir.FunctionType(kind.element, [x.type for x in before] + [kind])
            symbol = f"llvm.vector.reduce.{name}.v{WIDTH}{element}"
            function = cgutils.get_or_insert_function(builder.module, signature, symbol)
            return builder.call(function, [*before, vectors[0]], fastmath=FLAGS)
        return a.dtype(a), generate
    typed.__name__ = name
    return intrinsic(typed)


total = _reduction("fadd", lambda element: [ir.Constant(element, 0.0)])
peak = _reduction("fmax", lambda element: [])


@intrinsic
def _narrow(typing, a):
    def generate(context, builder, signature, arguments):
        return builder.fptrunc(arguments[0], ir.VectorType(ir.FloatType(), WIDTH))
    return Vector(types.float32)(a), generate


def cast(a, array):
    """Returns the vector a in array's dtype, which is a's own or a narrower one."""
    raise NotImplementedError("only within Numba's loops")


@overload(cast)
def _cast(a, array):
    if array.dtype == a.dtype:
        return lambda a, array: a
    return lambda a, array: _narrow(a)


@intrinsic
def floor(typing, a):
    """Returns the largest whole numbers that are not above a."""
    return a(a), lambda context, builder, signature, arguments: _call(builder, "floor", *arguments)


@intrinsic
def root(typing, a):
    """Returns the square root of a."""
    return a(a), lambda context, builder, signature, arguments: _call(builder, "sqrt", *arguments)


@intrinsic
def _power(typing, a):
    """Returns 2^a of whole float32 numbers by the exponent's bits: from a = -127, which gives 0, to 128, infinity."""
    def generate(context, builder, signature, arguments):
        integers = ir.VectorType(ir.IntType(32), WIDTH)
        whole = builder.fptosi(arguments[0], integers)
        biased = builder.add(whole, ir.Constant(integers, [127] * WIDTH))
        bits = builder.shl(biased, ir.Constant(integers, [23] * WIDTH))
        return builder.bitcast(bits, arguments[0].type)
    return a(a), generate


@intrinsic
def _exp2_f64(typing, a):
    return a(a), lambda context, builder, signature, arguments: _call(builder, "exp2", *arguments)


@intrinsic
def _or_nan(typing, a, b):
    """Returns b, but NaN where a is NaN."""
    def generate(context, builder, signature, arguments):
        a, b = arguments
        return builder.select(builder.fcmp_ordered("ord", a, a), b, a)
    return a(a, b), generate


@inner_loop
def _exp2_f32(x):
    """Returns 2^x as loops.exp2_f32 does."""
    # x is whole + f, within bounds
    bounded = largest(x, splat(np.float32(-127.0)))
    bounded = select(bounded, splat(np.float32(128.0)), splat(np.float32(128.0)), bounded)
    whole = floor(bounded + splat(np.float32(0.5)))
    f = bounded - whole

    # 2^f
    p = splat(np.float32(1.5403530393381609e-4))
    p = madd(p, f, splat(np.float32(1.3333558146428443e-3)))
    p = madd(p, f, splat(np.float32(9.618129107628477e-3)))
    p = madd(p, f, splat(np.float32(5.550410866482158e-2)))
    p = madd(p, f, splat(np.float32(2.402265069591007e-1)))
    p = madd(p, f, splat(np.float32(6.931471805599453e-1)))
    p = madd(p, f, splat(np.float32(1.0)))
    return _or_nan(x, p * _power(whole))


def exp2(x):
    """Returns 2^x of a vector."""
    raise NotImplementedError("only within Numba's loops")


@overload(exp2)
def _exp2(x):
    if x.dtype == types.float32:
        return lambda x: _exp2_f32(x)
    return lambda x: _exp2_f64(x)
