"""Detectors: one paper, one file; all with the two calls of `Detector`."""
