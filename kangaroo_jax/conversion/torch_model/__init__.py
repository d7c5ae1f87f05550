"""The files that an export ships, so that PyTorch users can load it without this package.

They import only torch, transformers, numpy and Pillow (and PyAV for videos), and each other.
"""
