"""What `make mac` asks of M5's matrix unit: the design's open questions, each measured and answered in a sentence."""
