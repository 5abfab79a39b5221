"""Train, quantize and deploy vision transformers in JAX."""
