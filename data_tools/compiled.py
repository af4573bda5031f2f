# mypy: disable-error-code="attr-defined"
"""Numba for loops over bytes: a place for compiled code, loads and stores without checks.

    @compiled
    def first_word(text): return load64(text, 0)

Numba compiles a function again when its own file changed, but does not look at the files of what it
calls: compiled functions call those of their own file and of this one, which is part of the place.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import xxhash
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from data_tools.files import cache_folder

_CACHE = Path(numba.config.CACHE_DIR or cache_folder("numba"))
_CACHE /= xxhash.xxh3_64_hexdigest(Path(__file__).read_bytes())


def compiled(function: Callable | None = None, /, **options: Any) -> Any:
    """`numba.njit`, without the interpreter's lock, whose results are kept in our cache folder."""
    if function is None:
        return lambda function: compiled(function, **options)
    configured = numba.config.CACHE_DIR  # read when a function is decorated
    numba.config.CACHE_DIR = str(_CACHE)
    try:
        return numba.njit(function, nogil=True, cache=True, **options)
    finally:
        numba.config.CACHE_DIR = configured


# Loads and stores without Numba's test for negative indices, at any alignment: loops over bytes
# are as fast as C with them. It is for the caller to keep every index within the array.


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, bits: int) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    place = cgutils.gep_inbounds(builder, data, index)
    return builder.bitcast(place, ir.IntType(bits).as_pointer())


@intrinsic
def load8(typing_context: Any, array: Any, index: Any) -> Any:
    """array[index] of a uint8 array, as int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], 8)
        return builder.zext(builder.load(pointer), ir.IntType(64))

    return types.int64(array, types.int64), generate


@intrinsic
def load64(typing_context: Any, array: Any, index: Any) -> Any:
    """Eight bytes from array[index] on, little endian."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], 64)
        value = builder.load(pointer)
        value.align = 1
        return value

    return types.uint64(array, types.int64), generate


@intrinsic
def store64(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Eight bytes to array[index] and on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], 64)
        builder.store(arguments[2], pointer).align = 1
        return context.get_dummy_value()

    return types.void(array, types.int64, types.uint64), generate


@intrinsic
def trailing_zeros(typing_context: Any, word: Any) -> Any:
    """How many bits below the lowest that is set; `word` is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate
