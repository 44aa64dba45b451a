"""The load generator: what do clients of a daemon see, and what of the devices' own rate is that?

==============  =====================================================================================
``program``     variants, and rounds of measurements in turns
``arguments``   their types
``load``        pure: when which client sends, and figures of the answers
``pictures``    what is sent: synthetic images, encodings, files
``connection``  a client's socket and shared memory
``generator``   sends and receives: one thread, one poller
``measure``     one measurement as a row
``kill``        the same of a worker's death
``servers``     what is loaded: a daemon, or the plain ZeroMQ path; processes, CPU time, memory
``bare``        the processes of the plain ZeroMQ path
``device``      the bare loop of an engine in a process of its own: the devices' limit
``replay``      outputs of a network for the timed engine
``host``        a program of its own: what an image costs the host, beside Pillow
``report``      medians, ratios, tables, JSON
``plot``        throughput against latency; needs matplotlib
==============  =====================================================================================
"""
