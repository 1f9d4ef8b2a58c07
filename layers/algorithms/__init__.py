"""Pure functions on tensors that a layer's `quantize()` composes: rounding, GPTQ, smoothing, low rank."""
