"""Calibration: text through the model, layer by layer, so that passes see what reaches every matrix."""
