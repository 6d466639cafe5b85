"""Simulation and verification of the nibblecore hardware: Amaranth simulator, Verilator, Icarus and formal proofs."""
