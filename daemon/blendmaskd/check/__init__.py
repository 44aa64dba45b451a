"""`blendmaskd check`: can the daemon serve on this host with these settings, and what is to be mended?

=============  ====================================================================================
``program``    has every area asked and judged, prints the report
``finding``    a line of the report
``devices``    cards, device nodes, groups
``software``   versions of torch, CANN, driver and firmware; the allocator
``cpus``       the CPU sets of devices, and the clock
``endpoints``  where the daemon is to listen, who has it, which keys there are
``front``      where the HTTP front is to listen, and who may ask it
``resources``  folders, the spool's disk, weights, descriptors, memory
``trials``     processes that do what a worker would: open a device, load the weights
``host``       what several of these ask for: whose a process is
=============  ====================================================================================

In each area what is named ``judge…`` is pure: it takes facts and returns findings, ``ok``, ``warning`` (it serves, not
as it could) or ``error`` (it will not serve as the settings say), with the remedy; none for what does not concern these
settings. The other functions ask the host for those facts.
"""
