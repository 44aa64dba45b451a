"""The evaluation programs: how exact a device is, and how fast.

`precision` compares a device with a reference, value by value, on fixed scenes; `performance` times devices in
processes of their own. Both write a log that parses back (`logs`), JSON and pictures.
"""
