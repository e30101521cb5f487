"""Traceable torch arithmetic on plain tensors and specs; no tensor subclass, no dispatch. The oracle is built from it.

Two rules hold everywhere in this folder: exponents are read from bits, never from `log2`; and a division by a constant
divides by a tensor, because torch on CUDA turns `x / number` into a multiplication by the rounded reciprocal.
"""
