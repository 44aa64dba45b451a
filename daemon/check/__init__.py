"""`blendmaskd check`: can the daemon serve on this host with these settings, and what is to be mended?

=====================  ==================================================================================
``program``            asks this host for facts, has them judged, prints the report
``finding``            a line of the report
``device_findings``    pure, as all of its kind: are the devices there, healthy and free, and whose?
``software_findings``  do the versions belong together, and which allocator do workers get?
``cpu_findings``       what are the CPU sets worth?
``endpoint_findings``  can the daemon listen, and who may connect?
``resource_findings``  folders, the spool, weights, descriptors, memory
=====================  ==================================================================================

What judges takes facts and returns findings: ``ok``, ``warning`` (it serves, not as it could) or ``error`` (it will not
serve as the settings say), with the remedy. A check that does not concern these settings returns nothing.
"""
