"""What the server knows of models, and how it reads and runs them.

errors     the error tree of this layer
catalog    models known by name: data, and where their files lie (no torch)
config     a checkpoint folder's files → one frozen ModelConfig; quirks end there (no torch)
registry   two tables: family → class, backend → class, imported lazily
weights    safetensors → parameters; missing or left-over tensors are errors
batch      PackedBatch: token ids of many texts in one row
backend    the protocol of all backends
native     the backend of our own packed families
bert       the BERT family
"""
