"""Servers that serve a checkpoint, and what is asked of them: evaluation by tasks, through
lm-evaluation-harness, and a first look by twenty prompts.

Belongs here: other people's programs as processes, how they are started and ended.

Read in this order:
    job              what the run root lacks is measured, then table, card and report are written
    harness          one task against one server
    server_process   a server as a process of this machine
    ray_server       a server as a Ray actor, where the GPUs are
    completions      what any server answers, and the log-probabilities it gives a text
    smoke            twenty prompts, and what looks broken in the answers
    smoke_table      the same for a terminal
    process_group    ends every process of a command when the command or its starter is gone

To add a server: a role's command in the configuration (docs/serving-and-evaluating.md).
"""
