"""What the server knows of models, and how it reads and runs them.

What is known and read without torch:

errors         the error tree of this layer
catalog        models known by name: data, and where their files lie
directory      every model's folder in a models directory
json_file      a JSON file of a checkpoint: typed access, errors that name file and field
architecture   config.json → what a family computes, in sizes and switches
config         a checkpoint folder's files → one frozen ModelConfig; quirks end there
golden         values that others have published, for the self-test
layout         which files of a checkpoint the server needs
manifest       embedserve.json: what a folder should hold, and whether it does
hub            `embedserve pull`: from the hub into a folder
bundle         models as one tar with checksums: pack, verify, unpack
progress       how far a long command is

What runs a model, with torch:

registry       two tables: family → class, backend → class, imported lazily
weights        safetensors → parameters; missing or left-over tensors are errors
batch          PackedBatch: token ids of many texts in one row
backend        the protocol of all backends
native         the backend of our own packed families:
  parts          the norms and linears that families are built of
  bert, xlm_roberta (both on encoder), jina_bert, qwen3, jina_clip
onnx           the backend of ONNX Runtime
transformers_backend   the backend of what transformers has a class for
heads          bge-m3's two further outputs, after any backend
convert        pickles → safetensors, nothing run
export         `embedserve export`: a model → an ONNX graph, compared before it counts
"""
