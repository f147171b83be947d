"""What a checkpoint is: safetensors headers and byte ranges, names per model family, source decoding, the output's config.

Nothing is re-exported here, so that reading headers does not import compressed-tensors (decode and output_config do).
"""
