"""How text is generated: beam search over a cached decoder, and CUDA graphs that run it."""
