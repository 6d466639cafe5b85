"""Runs programs: the container, the device, and the transports to golden model, simulation and boards."""
