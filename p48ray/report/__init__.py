"""What people read: report, model card, status, plan in print. From manifests and sums alone.

Belongs here: text and pictures. Nothing is computed on weights but `inspect` and `sample`, which
read bounded pieces of a checkpoint.

Read in this order:
    report, fold          numbers of a run; its manifests folded once
    html                  the page, by templates/ (Jinja2): run_sections, expert_sections,
                          ladder_section, benchmark_section; charts, heat, scales draw for it
    card, front_matter    the model card; storage_card: its paragraph on sparse storage
    status, work          how far a run is, and what the rest will take
    plan_table, ending    a plan before it is paid for; the last lines of a job that is done

To add a section: a template, a function that gives its values, a line in html.
"""
