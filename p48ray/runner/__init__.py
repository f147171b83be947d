"""Runners: who does which task when, on this machine or on a Ray cluster.

Belongs here: order, retries, progress. Nothing about what a task does. Only cluster, ray_runner,
ray_tasks and metrics import ray.

Read in this order:
    base                        WorkSource and Runner, the two sides of the loop
    pipeline                    the job: every stage does what the run root lacks
    overlap, layer_by_layer     which work can be done by now; streams, layer_units are their parts
    local_runner, ray_runner    one process, or actors on a cluster, each a worker_process;
                                dispatch picks the next task
    capacity                    what workers ask for, against what there is
    cluster, ray_tasks          the connection to Ray; a function over many items
    budget, stage_times         GPU-hours that may be spent; how long each stage has worked
    progress, metrics, console  what people and Prometheus see, and signals
    run_log                     what a driver leaves of it in the run root

To add a runner: a class with base.Runner's `run`.
"""
