"""What a checkpoint is: headers and byte ranges, names by model family, decoding, the output's
config.

Belongs here: knowledge of files. Weights are read by range, never a file as a whole.

Read in this order:
    header, index, layout    a safetensors header; a folder: where every tensor lies; every name of
                             an expert
    sidecars                 files beside the weights: which are carried over
    fp8                      linears in blocks of E4M3, read as BF16
    expert_checks, families  the experts that the config announces are there; which family it is
    finite_values            NaN and infinities in a tensor's bytes
    tensors, layer_reader    tensors from byte ranges; one layer, mapped where possible
    decode                   source weights as floats
    output_config, ignore    what config.json says of it, and of all that stays plain
    sparse_storage, storage_stream   what is written, in both storages
    modelopt, modelopt_config        NVIDIA's layout of the same, and its way back
    foreign                  paired-4:8 experts as others write them
    skeleton                 a checkpoint of true size without its weights, for estimates

To add a family: a file in families/ (docs/families.md). Nothing is re-exported here, so that
reading headers does not import compressed-tensors (decode and output_config do).
"""
