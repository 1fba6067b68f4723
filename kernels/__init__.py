"""Operations on the device, one a file: the formula, a plain torch reference beside it, and what is faster.

attention   softmax(QKᵀ/√d + B)V over packed sequences, in both directions or causal
alibi       the slopes and biases of ALiBi, the B of JinaBERT
rotary      positions as angles, of texts; rotary_2d of images
embedding   the first states: rows of the word and position tables, normalised
norm        LayerNorm and RMSNorm, each alone and after a residual sum
activation  the feed-forward non-linearities that checkpoints name
gated       feed-forward blocks whose one half is the other's gate: GEGLU, ReGLU, SwiGLU
linear      xWᵀ + b, with a fused activation or residual where the CPU library offers it
int8        the same in 8 bits, for CPUs that have products of them
pooling     token states → one vector a text: pool, cut, normalise, check
heads       token states → lexical weights and a vector a token, bge-m3's outputs besides the dense one
dispatch    which implementation of each runs on which device: the one table of that choice

On CUDA most have a kernel of our own beside them, in a file of the same name and `_triton`, imported when it is chosen.

Needs torch; imports nothing else of the project.
"""
