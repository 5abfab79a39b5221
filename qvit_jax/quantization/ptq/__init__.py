"""Post-training quantization: rows, calibration, one file a solver."""
