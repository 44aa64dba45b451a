"""Fuzzing: malformed frames, headers, images, descriptors and requests, and what must come of each.

=============  ======================================================================================================
mutate         bytes that were damaged
headers        frames and headers: valid ones damaged, and what msgpack can say that no client would
pictures       images damaged, as bytes and by what their formats are made of; raw arrays; paths
bombs          small files that ask for much
rules          pure: what may come of an input in this process (`protocol.decode`, `blendmaskd.images.decoding`)
child          runs such inputs in a process of its own, so that a crash is noticed, and can be told
live           a daemon of our own, with a good client that must be served all the time
strangers      what is thrown at it: at the clients' socket, the shared memory's, the metrics page
program        `scripts/fuzz.py`
=============  ======================================================================================================

Every input follows from the seed, its layer and its number, so that each can be made again. The mutators are our own
rather than a coverage-guided fuzzer's: what is fuzzed is native (msgspec, libjpeg, libtiff), where one for Python sees
nothing, and seeds must mean the same on every machine.

For tests of the daemon only; no part of what serves imports anything from here.
"""
