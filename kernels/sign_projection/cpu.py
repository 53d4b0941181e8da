"""
The sign projection as loops for a CPU: tables of the sums of eight numbers by their signs, read or added to by a byte.

A task has ROWS rows. It takes BLOCK words of columns at a time, whose tables, 16 KiB in float32, stay in the first
cache, and within them TILE rows, whose words are mixed in one loop that the compiler vectorises: rows are neighbours in
it. Row numbers are uint32; `first` is added modulo 2^32. A table is (4 words, 256) flat; where the last word has no
four groups of columns, tables of zeros fill it up.
"""

import numpy as np
from numba import prange

from kernels.loops import inline_loop, loop, parallel_loop, use_threads

ROWS = 16_384   # of a task
TILE = 512      # rows whose words are there at a time
BLOCK = 4       # words of 32 columns that a task takes at a time
STRIDE = np.uint32(2_654_435_769)   # between the words of a row


@inline_loop
def _mix(x):
    """Returns x, uint32, well mixed. Every result is cut to 32 bits, as Numba widens them to 64."""
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x21F0AAAD))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x735A2D97))
    return np.uint32(x ^ (x >> np.uint32(15)))


@loop
def _mix_rows(first, mixed):
    for r in range(len(mixed)):
        mixed[r] = _mix(np.uint32(first + np.uint32(r)))


@loop
def _mix_word(mixed, word, bits):
    step = np.uint32(np.uint32(word) * STRIDE)
    for r in range(len(mixed)):
        bits[r] = _mix(np.uint32(mixed[r] + step))


@loop
def _read_tile(table, bits, out):
    """Adds to each row of out the four numbers of a word's table (1024,) that its bits choose."""
    for r in range(len(out)):
        x = bits[r]
        near = table[x & np.uint32(255)] + table[np.uint32(256) + ((x >> np.uint32(8)) & np.uint32(255))]
        far = table[np.uint32(512) + ((x >> np.uint32(16)) & np.uint32(255))] + table[np.uint32(768) +
                                                                                      (x >> np.uint32(24))]
        out[r] += near + far


@loop
def _add_tile(table, bits, numbers):
    """Adds each row's number to the four sums of a word's table (1024,) that its bits choose."""
    for r in range(len(numbers)):
        x = bits[r]
        number = numbers[r]
        table[x & np.uint32(255)] += number
        table[np.uint32(256) + ((x >> np.uint32(8)) & np.uint32(255))] += number
        table[np.uint32(512) + ((x >> np.uint32(16)) & np.uint32(255))] += number
        table[np.uint32(768) + (x >> np.uint32(24))] += number


@loop
def _multiply_task(table, first, theta):
    """Makes theta, the rows of a task from number `first` on."""
    count = len(table) // 1024
    mixed = np.empty(TILE, np.uint32)
    bits = np.empty(TILE, np.uint32)
    for r in range(len(theta)):
        theta[r] = 0
    for block in range(0, count, BLOCK):
        for start in range(0, len(theta), TILE):
            out = theta[start:min(start + TILE, len(theta))]
            here = mixed[:len(out)]
            _mix_rows(np.uint32(first + np.uint32(start)), here)
            for word in range(block, min(block + BLOCK, count)):
                _mix_word(here, word, bits[:len(out)])
                _read_tile(table[1024 * word:1024 * (word + 1)], bits[:len(out)], out)


@loop
def _add_task(numbers, first, signs, sums, count):
    """Makes sums (8 groups,), of the rows of a task from number `first` on. signs (256, 8): of every byte."""
    mixed = np.empty(TILE, np.uint32)
    bits = np.empty(TILE, np.uint32)
    table = np.empty(1024 * BLOCK, numbers.dtype)
    for block in range(0, count, BLOCK):
        # rows of equal signs
        size = min(BLOCK, count - block)
        for i in range(1024 * size):
            table[i] = 0
        for start in range(0, len(numbers), TILE):
            tile = numbers[start:min(start + TILE, len(numbers))]
            here = mixed[:len(tile)]
            _mix_rows(np.uint32(first + np.uint32(start)), here)
            for word in range(size):
                _mix_word(here, block + word, bits[:len(tile)])
                _add_tile(table[1024 * word:1024 * (word + 1)], bits[:len(tile)], tile)

        # times their signs
        for group in range(min(4 * size, len(sums) // 8 - 4 * block)):
            columns = sums[8 * (4 * block + group):8 * (4 * block + group + 1)]
            for column in range(8):
                columns[column] = 0
            for byte in range(256):
                total = table[256 * group + byte]
                for column in range(8):
                    columns[column] += total * signs[byte, column]


@parallel_loop
def _multiply(table, first, theta):
    for task in prange((len(theta) + ROWS - 1) // ROWS):
        start = task * ROWS
        _multiply_task(table, np.uint32(first + np.uint32(start)), theta[start:min(start + ROWS, len(theta))])


@parallel_loop
def _add_rows(numbers, first, signs, partial, count):
    for task in prange(len(partial)):
        start = task * ROWS
        _add_task(numbers[start:min(start + ROWS, len(numbers))], np.uint32(first + np.uint32(start)), signs,
                  partial[task], count)


def multiply(table: np.ndarray, first: int, theta: np.ndarray):
    """
    Writes theta (rows,): each row's sum of one number of each group of table (groups * 256,). first: the first row's
    number, with the seed added, an int32.
    """
    missing = -len(table) % 1024
    if missing:
        table = np.concatenate((table, np.zeros(missing, table.dtype)))
    use_threads(-(-len(theta) // ROWS))
    _multiply(table, np.uint32(first % 2 ** 32), theta)


def add_rows(numbers: np.ndarray, groups: int, first: int, signs: np.ndarray) -> np.ndarray:
    """Returns the sums over each task's rows of numbers (rows,) with their signs, (tasks, 8 groups)."""
    tasks = -(-len(numbers) // ROWS)
    partial = np.empty((tasks, 8 * groups), numbers.dtype)
    use_threads(tasks)
    _add_rows(numbers, np.uint32(first % 2 ** 32), signs, partial, -(-groups // 4))
    return partial
