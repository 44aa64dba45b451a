"""Fuzzing: malformed frames, headers, images, descriptors and requests, and what must come of each.

Every input follows from the seed, its layer and its number, so that each can be made again. The mutators are our own
rather than a coverage-guided fuzzer's: what is fuzzed is native (msgspec, libjpeg, libtiff), where one for Python sees
nothing, and seeds must mean the same on every machine.

For tests of the daemon only; no part of what serves imports anything from here.
"""
