"""`make gpu-check`: the Metal kernels, compiled for an NVIDIA GPU, against float64 at full size. See REPORT.md."""
