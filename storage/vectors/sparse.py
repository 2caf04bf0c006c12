#!/usr/bin/env python3
"""Keeps the sectors of an image that are not zero: each as its number (u64 LE) and 512 bytes."""
import struct, sys

with open(sys.argv[1], "rb") as image, open(sys.argv[2], "wb") as out:
    number = 0
    while sector := image.read(512):
        if sector.strip(b"\0"):
            out.write(struct.pack("<Q", number) + sector.ljust(512, b"\0"))
        number += 1
