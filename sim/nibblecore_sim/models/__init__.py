"""Models of what stands around the core: memories behind AXI, for Amaranth's simulator and for cocotb."""
