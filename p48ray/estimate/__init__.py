"""What a plan will cost before it is run. Arithmetic on a plan; nothing is measured on the spot.

Belongs here: hours, bytes and memory as functions of a plan. Every measured rate is a field of
`Rates`, every count of copies fitted to measured peaks a constant of `memory`.

Read in this order:
    plan_cost   the whole: bytes read, written and stored, time and memory
    duration    FLOP, steps and bytes over measured rates
    rates       those rates (`Rates`)
    held_out    the same of what is compared on held-out text
    nearness    what of a run crosses the network
    memory      a worker's peak, on its GPU and beside it
    stored      the most that a run root holds at a time
    fit         the peak against what a card and a machine have

To add a rate: measure it (docs/PERFORMANCE.md), then a field of `Rates` with machine and date.
"""
