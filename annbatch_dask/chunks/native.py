"""Many chunks read, checked and decoded in one call that holds no lock of Python's.

Each step is a C function that is in the process anyway: the C library's, blosc's of numcodecs, crc32c's of
google_crc32c, and libdeflate's of deflate. Their addresses are looked up by name and handed to a compiled kernel, which
therefore is good for any process. Where one of them is missing, so is the step, and what calls it takes its plain way,
as :mod:`annbatch_dask.chunks.reader` does. That way also defines every error: a chunk that is not as it should be is
only reported here, never explained.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from annbatch_dask.kernels.compiled import compiled
from annbatch_dask.kernels.packed import BLOCK_VALUES
from annbatch_dask.kernels.shared import add_to

__all__ = [
    "BLOSC",
    "IN_MEMORY",
    "PLAIN",
    "c_function",
    "can_fill",
    "can_inflate",
    "crc_matches",
    "decode",
    "fill",
    "fill_next",
    "functions",
    "inflate_names",
    "read_file",
    "unpack_from",
]

logger = logging.getLogger(__name__)

Ints = NDArray[np.int64]

PLAIN, BLOSC = 0, 1
"""What the bytes of a chunk are: its values, or those compressed by blosc; any other number is the address of
:func:`annbatch_dask.kernels.packed.unpacker`'s function for them."""

IN_MEMORY = -1
"""In the place of a file: the bytes were read before."""

_PREAD, _STATX, _MEMCPY, _CRC, _BLOSC, _ALLOCATE, _INFLATE, _FREE = range(8)
_AT_EMPTY_PATH, _BASIC_STATS = 0x1000, 0x7FF
_BLOSC_HEADER_NBYTES = 16


@cache
def functions() -> Ints:
    """Addresses of the C functions, 0 for those that are not there."""
    found = np.zeros(8, np.int64)
    if sys.platform != "linux" or sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:  # noqa: PLR2004
        return found
    here = ctypes.CDLL(None)
    for place, name in ((_PREAD, "pread"), (_STATX, "statx"), (_MEMCPY, "memcpy")):
        found[place] = _address(here, name)
    for place, find in ((_CRC, _find_crc), (_BLOSC, _find_blosc)):
        try:
            found[place] = find()
        except (AttributeError, ImportError, OSError) as error:  # built in another way
            logger.debug("%s", error)
    found[_ALLOCATE:] = _find_inflate()
    if not found.all():
        logger.warning(
            "chunks or names are decoded one by one: functions of libc, numcodecs, google_crc32c or deflate are missing"
        )
    return found


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 if hasattr(library, name) else 0


def _find_crc() -> int:
    from google_crc32c import _crc32c

    library, sample = ctypes.CDLL(_crc32c.__file__), b"123456789"
    crc = library.crc32c_value
    crc.restype, crc.argtypes = ctypes.c_uint32, (ctypes.c_char_p, ctypes.c_size_t)
    return _address(library, "crc32c_value") if crc(sample, len(sample)) == google_crc32c.value(sample) else 0


def _find_blosc() -> int:
    library, sample = ctypes.CDLL(numcodecs.blosc.__file__), b"0123456789abcdef" * 64
    decompress, out = library.blosc_decompress_ctx, ctypes.create_string_buffer(len(sample))
    decompress.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    n = decompress(numcodecs.blosc.Blosc().encode(sample), out, len(sample), 1)
    return _address(library, "blosc_decompress_ctx") if n == len(sample) and out.raw == sample else 0


def _find_inflate() -> list[int]:
    try:
        import deflate

        library = ctypes.CDLL(sys.modules[f"{deflate.__name__}._deflate"].__file__)
    except (ImportError, KeyError, OSError) as error:  # built in another way
        logger.debug("%s", error)
        return [0, 0, 0]
    names = ("alloc_decompressor", "zlib_decompress", "free_decompressor")
    return [_address(library, f"libdeflate_{name}") for name in names]


def can_inflate() -> bool:
    """True if all functions are there that :func:`inflate_names` needs."""
    return bool(functions()[[_MEMCPY, _ALLOCATE, _INFLATE, _FREE]].all())


def can_fill(*, is_blosc: bool, has_crc: bool, from_files: bool) -> bool:
    """True if all functions are there that such chunks need."""
    needed = [_MEMCPY, *([_BLOSC] if is_blosc else []), *([_CRC] if has_crc else [])]
    needed += [_PREAD, _STATX] if from_files else []
    return bool(functions()[needed].all())


def c_function(result: int, *arguments: int) -> Any:
    """A call, in a kernel, of the C function at an address; integers of so many bits, pointers among them."""

    def call(_typing: Any, _address: Any, _arguments: Any) -> tuple[Any, Callable[..., Any]]:
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            wanted = [ir.IntType(n_bits) for n_bits in arguments]
            given = [
                value if kind.width == value.type.width else builder.trunc(value, kind)
                for value, kind in zip(cgutils.unpack_tuple(builder, args[1]), wanted, strict=True)
            ]
            number = ir.IntType(64)
            function = builder.inttoptr(args[0], ir.FunctionType(ir.IntType(result), wanted).as_pointer())
            returned = builder.call(function, given)
            return returned if result == number.width else builder.sext(returned, number)

        return types.int64(types.int64, types.UniTuple(types.int64, len(arguments))), generate

    return intrinsic(call)


_pread = c_function(64, 32, 64, 64, 64)
_statx = c_function(32, 32, 64, 32, 32, 64)
_memcpy = c_function(64, 64, 64, 64)
_crc32c = c_function(32, 64, 64)
_blosc = c_function(32, 64, 64, 64, 32)
_unpack = c_function(64, 64, 64, 64, 64, 64, 64)
_allocate = c_function(64, 64)  # takes nothing, but a tuple here holds something
_inflate = c_function(32, 64, 64, 64, 64, 64, 64)
_free = c_function(64, 64)


@compiled
def _number(raw: Any, at: int) -> Any:
    """Four bytes as a number, little-endian, with a sign."""
    low = np.int64(raw[at]) | np.int64(raw[at + 1]) << 8 | np.int64(raw[at + 2]) << 16
    return low | np.int64(np.int8(raw[at + 3])) << 24


@compiled
def read_file(file: Any, offset: int, nbytes: int, c: Any, raw: Any, found: Any) -> Any:
    """Read from an open file into ``raw``; whether all was there, and the file is in its version afterwards."""
    done = 0
    while done < nbytes:
        n = _pread(c[_PREAD], (file[0], np.int64(raw.ctypes.data) + done, nbytes - done, offset + done))
        if n <= 0:
            return False
        done += n
    at = np.int64(found.ctypes.data)
    if _statx(c[_STATX], (file[0], at + 256, _AT_EMPTY_PATH, _BASIC_STATS, at)) != 0:
        return False
    return found[14] * 1_000_000_000 + (found[15] & 0xFFFFFFFF) == file[1] and found[5] == file[2]


@compiled
def crc_matches(raw: Any, at: int, size: int, c: Any) -> bool:
    """True if the crc32c behind ``raw[at:at + size]`` is that of these bytes."""
    return bool(_crc32c(c[_CRC], (np.int64(raw.ctypes.data) + at, size)) == _number(raw, at + size))


@compiled
def unpack_from(unpacker: int, source: int, size: int, n_values: int, start: int, target: int, n: int) -> Any:  # noqa: PLR0913, PLR0917
    """Unpack n values of a packed chunk of so many bytes and values; 0, or what is wrong with it."""
    return _unpack(unpacker, (source, size, n_values, start, target, n))


@compiled
def _are_few(pieces: Any, n_values: int) -> bool:
    """True if unpacking the blocks of each piece of a chunk takes no more work than unpacking the whole chunk."""
    n_blocks = 0
    for p in range(len(pieces)):
        n_blocks += (pieces[p, 1] - 1) // BLOCK_VALUES - pieces[p, 0] // BLOCK_VALUES + 1
    return n_blocks <= (n_values + BLOCK_VALUES - 1) // BLOCK_VALUES


@compiled
def _unpack_pieces(source: int, size: int, how: Any, pieces: Any) -> Any:
    """Unpack each piece of a chunk to where it belongs; 0 if the chunk is sound, as far as it was looked at."""
    status = 0
    for p in range(len(pieces)):
        start, target = pieces[p, 0], how[5] + pieces[p, 2] * how[6]
        status |= unpack_from(how[0], source, size, how[2], start, target, pieces[p, 1] - start)
    return status


@compiled
def decode(raw: Any, at: int, size: int, how: Any, c: Any, target: int) -> bool:
    """Decode the whole chunk ``raw[at:at + size]``, which is not plain; whether it is sound."""
    source, nbytes = np.int64(raw.ctypes.data) + at, how[2] * how[3]
    if how[0] != BLOSC:
        return bool(unpack_from(how[0], source, size, how[2], 0, target, how[2]) == 0)
    if size < _BLOSC_HEADER_NBYTES or _number(raw, at + 4) != nbytes or _number(raw, at + 12) != size:
        return False
    return bool(_blosc(c[_BLOSC], (source, target, nbytes, 1)) == nbytes)


@compiled
def _place(raw: Any, at: int, size: int, how: Any, pieces: Any, c: Any, spare: Any) -> bool:
    """Check and decode the chunk ``raw[at:at + size]`` to where its pieces belong; whether it is sound."""
    source = np.int64(raw.ctypes.data) + at
    if how[1]:
        size -= 4
        if size < 0 or not crc_matches(raw, at, size, c):
            return False
    n_rows, row_nbytes, width, dest, stride = how[2], how[3], how[4], how[5], how[6]
    nbytes = n_rows * row_nbytes
    is_whole = len(pieces) == 1 and pieces[0, 1] - pieces[0, 0] == n_rows and width == row_nbytes == stride
    if how[0] == PLAIN:
        if size != nbytes:
            return False
    elif how[0] != BLOSC and _are_few(pieces, n_rows):
        return bool(_unpack_pieces(source, size, how, pieces) == 0)
    else:
        target = dest + pieces[0, 2] * stride if is_whole else np.int64(spare.ctypes.data)
        if not decode(raw, at, size, how, c, target):
            return False
        if is_whole:
            return True
        source = target
    for p in range(len(pieces)):
        start, stop = pieces[p, 0], pieces[p, 1]
        here, there = source + start * row_nbytes, dest + pieces[p, 2] * stride
        if width == row_nbytes == stride:
            _memcpy(c[_MEMCPY], (there, here, (stop - start) * row_nbytes))
            continue
        for row in range(stop - start):
            _memcpy(c[_MEMCPY], (there + row * stride, here + row * row_nbytes, width))
    return True


@compiled
def fill(  # noqa: PLR0913, PLR0917 - a kernel
    reads: Any, chunks: Any, pieces: Any, hows: Any, first: int, stop: int, c: Any, raw: Any, spare: Any, is_done: Any
) -> int:
    """Read and decode some chunks to where they belong. Nothing is written outside of their places.

    Parameters
    ----------
    reads
        (n, 8) open file, the time of its version and its bytes, offset, bytes, a half-open run of ``chunks``, and its
        row in ``hows``. Where the file is ``IN_MEMORY``, ``raw`` holds the bytes.
    chunks
        (n, 5) offset in the file, size, a half-open run of ``pieces``; the runs count from the bases in ``hows``.
    pieces
        (n, 3) rows ``[start, stop)`` of the chunk, and the row of the output where they go.
    hows
        (n, 9) ``PLAIN``, ``BLOSC``, or what unpacks arrays of one dimension; whether a crc32c follows; rows of a chunk,
        bytes of each, and how many of these are wanted; address of the output's first row, bytes from one to the next;
        base of the chunks and of the pieces.
    first, stop
        The reads to do.
    c
        :func:`functions`.
    raw, spare
        Bytes to work in, as large as the largest read, and as the largest chunk.
    is_done
        Set for each chunk that was placed; one that is not is damaged, or its file is not as it was.

    Returns
    -------
    n_left
        Chunks of these reads that were not placed.
    """
    n_left, found = 0, np.zeros(33, np.int64)
    for r in range(first, stop):
        read, how = reads[r], hows[reads[r, 7]]
        is_read = read[0] == IN_MEMORY or read_file(read, read[3], read[4], c, raw, found)
        for k in range(how[7] + read[5], how[7] + read[6]):
            chunk = chunks[k]
            own = pieces[how[8] + chunk[2] : how[8] + chunk[3]]
            is_done[k] = is_read and _place(raw, chunk[0] - read[3], chunk[1], how, own, c, spare)
            n_left += not is_done[k]
    return n_left


@compiled
def fill_next(  # noqa: PLR0913, PLR0917 - a kernel
    reads: Any, chunks: Any, pieces: Any, hows: Any, c: Any, raw: Any, spare: Any, is_done: Any, state: Any
) -> int:
    """Make reads that no other call with the same ``state`` has begun, as :func:`fill` does.

    ``state`` has the number of the next read, of the chunks that could not be placed, of the calls that have ended, and
    of all calls. The last call to end returns how many chunks of all reads could not be placed, all others 0.
    """
    n_left, number = 0, add_to(state, 0, 1)
    while number < len(reads):
        n_left += fill(reads, chunks, pieces, hows, number, number + 1, c, raw, spare, is_done)
        number = add_to(state, 0, 1)
    add_to(state, 1, n_left)
    is_last = add_to(state, 2, 1) + 1 == state[3]
    return add_to(state, 1, 0) if is_last else 0


@compiled
def inflate_names(  # noqa: PLR0913, PLR0917 - a kernel
    rows: Any, n_each: int, packed: Any, ends: Any, separator: Any, c: Any, spare: Any, out: Any
) -> int:
    """Take some names out of compressed blocks of names.

    Parameters
    ----------
    rows
        (n,) which ones; those of one block are best one after the other.
    n_each
        Names of a block.
    packed, ends
        The blocks, in zlib's format, one after the other, and where each ends.
    separator
        The bytes between two names of a block.
    c
        :func:`functions`.
    spare
        Bytes for a block that was inflated.
    out
        Bytes for the names, each followed by the separator.

    Returns
    -------
    n_bytes
        How many of ``out``; -1 where a block is damaged, or too large for what was given.
    """
    inflated, last, n_bytes, n_out, width = np.zeros(1, np.int64), -1, 0, 0, len(separator)
    firsts = np.zeros(n_each + 1, np.int64)
    inflater = _allocate(c[_ALLOCATE], (0,))
    if inflater == 0:
        return -1
    for i in range(len(rows)):
        block = rows[i] // n_each
        if block != last:
            last, start = block, ends[block - 1] if block else 0
            source, room = np.int64(packed.ctypes.data) + start, len(spare)
            given = (inflater, source, ends[block] - start, np.int64(spare.ctypes.data), room)
            if _inflate(c[_INFLATE], (*given, np.int64(inflated.ctypes.data))) != 0:
                n_out = -1
                break
            n_bytes = inflated[0]
            _find_names(spare, n_bytes, separator, firsts)
        first, stop = firsts[rows[i] % n_each], firsts[rows[i] % n_each + 1]
        n = stop - first  # the separator among them
        if n < width or n_out + n > len(out):
            n_out = -1
            break
        for k in range(first, stop - width):  # the last name of a block has no separator behind it
            out[n_out] = spare[k]
            n_out += 1
        for k in range(width):
            out[n_out] = separator[k]
            n_out += 1
    _free(c[_FREE], (inflater,))
    return n_out


@compiled
def _find_names(text: Any, n_bytes: int, separator: Any, firsts: Any) -> None:
    """Offsets of the names of a block, as if a separator followed each; padded with the last offset."""
    width, k, at = len(separator), 0, 0
    firsts[:] = n_bytes + width
    firsts[0] = 0
    while at <= n_bytes - width and k + 1 < len(firsts):
        n_alike = 0
        while n_alike < width and text[at + n_alike] == separator[n_alike]:
            n_alike += 1
        if n_alike == width:
            k += 1
            firsts[k] = at + width
        at += width if n_alike == width else 1
