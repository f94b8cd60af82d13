"""The algorithms of quantization as pure functions on tensors: scales, GPTQ, activations, equalisation."""
