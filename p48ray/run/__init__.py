"""The run root: all that is state. Records of what will be done and what was done, and where they
lie.

Belongs here: a stored record, the name of an object, and what follows from both: which are missing,
which can go. Nothing touches a weight.

Read in this order:
    run_root        the name of every object
    records         the base of all that is stored: frozen, closed to unknown keys, strict JSON
    plan            what will be done: a function of the configuration and the checkpoint's headers
    passes          what a plan's streams run and leave
    manifest        what was done: one record for each finished piece of work
    checkpoint_manifest   what a finished checkpoint says of itself
    greedy_records  what is known of greedy continuations, and how far they are followed
    checked         those records as readers get them: held against what was asked for
    scale_counts    what becomes of values that share a scale
    scales          a layer's input scales, held against its parts
    changing_hands  whose run root it is, and how a pilot's becomes the full run's
    output_layout   where every byte of the output lies
    scratch         a folder apart for what streams leave
    needs, cleanup  what a run root still lacks, and what of it nobody will read again
    doctor          what is unsound in a run root, and what to delete
    arrow           rows of tokens as files; benchmark_results: records of an evaluation by tasks

To add a record: derive it from records.Record with a schema_version, name its object in run_root.
"""
