"""Backbones and segmenters: images to logits, and named feature maps for other networks."""
