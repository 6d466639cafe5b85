"""The nibblecore accelerator as Amaranth components."""
