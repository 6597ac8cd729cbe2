"""Letters and digits as they are written in pictures: five dots wide, seven high, a dot 5 x 8 pixels."""

from functools import cache

import numpy as np

DOT = 5, 8  # pixels of a dot: wide, high
WIDE, HIGH = 32, 64  # pixels of a letter's cell: one token wide, two high
# Rows from the top, the leftmost dot the highest of five bits.
_ROWS = {
    "A": "0E 11 11 1F 11 11 11",
    "B": "1E 11 11 1E 11 11 1E",
    "C": "0F 10 10 10 10 10 0F",
    "D": "1E 11 11 11 11 11 1E",
    "E": "1F 10 10 1E 10 10 1F",
    "F": "1F 10 10 1E 10 10 10",
    "G": "0F 10 10 13 11 11 0F",
    "H": "11 11 11 1F 11 11 11",
    "I": "0E 04 04 04 04 04 0E",
    "J": "07 02 02 02 02 12 0C",
    "K": "11 12 14 18 14 12 11",
    "L": "10 10 10 10 10 10 1F",
    "M": "11 1B 15 15 11 11 11",
    "N": "11 19 19 15 13 13 11",
    "O": "0E 11 11 11 11 11 0E",
    "P": "1E 11 11 1E 10 10 10",
    "Q": "0E 11 11 11 15 12 0D",
    "R": "1E 11 11 1E 14 12 11",
    "S": "0F 10 10 0E 01 01 1E",
    "T": "1F 04 04 04 04 04 04",
    "U": "11 11 11 11 11 11 0E",
    "V": "11 11 11 11 0A 0A 04",
    "W": "11 11 11 15 15 1B 11",
    "X": "11 11 0A 04 0A 11 11",
    "Y": "11 11 0A 04 04 04 04",
    "Z": "1F 01 02 04 08 10 1F",
    "0": "0E 11 13 15 19 11 0E",
    "1": "04 0C 14 04 04 04 1F",
    "2": "0E 11 01 06 08 10 1F",
    "3": "1F 01 02 06 01 11 0E",
    "4": "02 06 0A 12 1F 02 02",
    "5": "1F 10 1E 01 01 11 0E",
    "6": "06 08 10 1E 11 11 0E",
    "7": "1F 01 02 02 04 04 04",
    "8": "0E 11 11 0E 11 11 0E",
    "9": "0E 11 11 0F 01 02 0C",
}
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
CHARACTERS = LETTERS + DIGITS


@cache
def glyph(character: str) -> np.ndarray:
    """Coverage of a character's cell, float32 [HIGH, WIDE], 0 or 1, the dots in its middle."""
    rows = [int(row, 16) for row in _ROWS[character].split()]
    dots = np.array([[row >> (4 - column) & 1 for column in range(5)] for row in rows], dtype=np.float32)
    inked = dots.repeat(DOT[1], 0).repeat(DOT[0], 1)
    cell = np.zeros((HIGH, WIDE), dtype=np.float32)
    top, left = (HIGH - inked.shape[0]) // 2, (WIDE - inked.shape[1]) // 2
    cell[top : top + inked.shape[0], left : left + inked.shape[1]] = inked
    return cell
