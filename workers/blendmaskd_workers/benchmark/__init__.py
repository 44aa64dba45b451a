"""The load generator: what do clients of a daemon see, and what of the devices' own rate is that?"""
