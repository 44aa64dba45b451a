"""The load generator: what do clients of a daemon see, and what of the devices' own rate is that?

==============  =====================================================================================
``program``     arguments; rounds of measurements; the order in which they come
``load``        pure: when which client sends, and figures of the answers
``pictures``    what is sent: synthetic images, encodings, files, by which transport
``generator``   sends and receives: one thread, one poller
``servers``     what is loaded: a daemon, or the plain ZeroMQ path; processes, CPU time, memory
``bare``        the processes of the plain ZeroMQ path
``device``      the bare loop of an engine in a process of its own: the devices' limit
``report``      medians, ratios, tables, JSON
``plot``        throughput against latency; needs matplotlib
==============  =====================================================================================
"""
