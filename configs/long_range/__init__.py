"""The long-range suite, after Long Range Arena (arXiv 2011.04006): one config per task, small or as in the paper."""
