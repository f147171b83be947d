"""What is done to a finished checkpoint: verified by a stranger, converted, published.

Belongs here: work on a checkpoint folder that needs no run root.

Read in this order:
    survey                        what a checkpoint announces, before its shards are read
    verify_checkpoint, verifier   every byte against p48ray.json and, where given, the source
    convert, converter            dense to sparse storage and back, without loss
    publish, publisher            shards to the Hub, then one commit
    upload, branch                one shard on its way; what is asked of a repository's branch

The first of each pair says what is done to a shard, the second runs it in one process or in many.
To add a command: a pair here, a few lines in cli or in jobs/.
"""
