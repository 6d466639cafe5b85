"""Synthesis, placement and routing with open tools: what a core costs, and how fast it runs.

Yosys and nextpnr come from PyPI (YoWASP). :mod:`.devices` says how each FPGA is asked for, :mod:`.run` asks. Nothing is
imported here: the command line lists devices without loading Amaranth.
"""
