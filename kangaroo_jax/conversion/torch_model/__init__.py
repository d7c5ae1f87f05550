"""The files that an export ships, so that PyTorch users can load it with nothing of ours installed.

They import torch, transformers, numpy and Pillow alone (and PyAV for videos), and each other.
"""
