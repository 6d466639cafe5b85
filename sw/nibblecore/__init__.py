"""nibblecore: from a PyTorch network to a 4-bit FPGA accelerator, with open tools only."""

__version__ = "0.1.0"
