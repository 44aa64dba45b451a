"""`blendmaskd check`: can the daemon serve on this host with these settings, and what is to be mended?

A module per area; `program` has all of them asked and judged. What is named ``judge…`` is pure: it takes facts and
returns findings, ``ok``, ``warning`` (it serves, not as it could) or ``error`` (it will not serve as the settings say),
with the remedy; none for what does not concern these settings. The other functions ask the host for those facts.
"""
