"""Tests of training share the machine: one thread each, which also makes sums the same everywhere."""

import torch

torch.set_num_threads(1)
