"""Data sets small enough to train on in a test, each with its fixed split."""
