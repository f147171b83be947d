"""Evaluation by tasks: lm-evaluation-harness asks a server that serves a checkpoint.

Belongs here: other people's programs as processes, how they are started and ended.

Read in this order:
    job              what the run root lacks is measured, then table, card and report are written
    harness          one task against one server
    server_process   a server as a process of this machine
    ray_server       a server as a Ray actor, where the GPUs are
    process_group    ends every process of a command when the command or its starter is gone

To add a server: a role's command in the configuration (docs/serving-and-evaluating.md).
"""
