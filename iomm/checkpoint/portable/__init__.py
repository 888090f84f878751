"""Files that an exported folder carries. They import torch, transformers and diffusers only, not iomm."""
