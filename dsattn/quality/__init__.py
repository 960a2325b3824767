"""Sampling prompt suites with and without sparse attention, and scoring what came out, in the manner of VBench.

``suites`` says what to make, ``sampling`` makes it, ``evaluate`` scores it, ``vbench`` holds what is VBench's own.
"""
