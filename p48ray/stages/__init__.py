"""The stages of a job: what a task of each does. Where tasks follow from each other (the streams
and the units), runner names them; else a stage lists what is left of it.

Belongs here: bodies of tasks, and what is done once before them. No Ray: a stage does not know who
runs it. compress, and the context that every task gets, have a folder of their own, `unit`.

Read in this order:
    table                           one record a stage, in the order of a job
    tasks, workplace                a task and how it ended; what a process works with
    prepare, revisions, inputs      before anything is written, then the first things written
    mirror                          the Hub's files, copied once
    scan                            values that are not finite outside the experts, before any work
    capture, gradients, propagate   the streams; streaming, derivatives, blobs are their parts
    reduce, verify, final_files     the checkpoint; shard_proof, linear_proof, index_proof,
                                    read_ahead verify
    evaluate                        held-out text through source and checkpoint;
                                    compressed_experts: where its experts come from;
                                    side_by_side: the models that it compares;
                                    cells: its sums, by source and position
    greedy                          how long the checkpoint writes what its source writes

To add a stage: a module here and a record in table (docs/EXTENDING.md).
"""
