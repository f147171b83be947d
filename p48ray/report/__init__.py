"""What people read: report, model card, status, plan in print. From manifests and sums alone.

Belongs here: text and pictures. Nothing is computed on weights but `inspect` and `sample`, which
read bounded pieces of a checkpoint.

Read in this order:
    report, fold          numbers of a run; its manifests folded once
    html                  the page, by templates/ (Jinja2): run_sections, expert_sections,
                          scale_section, ladder_section, domain_section, greedy_section,
                          benchmark_section;
                          charts, heat, scales draw for it
    scale_figures         what scales cost, layer by layer
    gains                 bits a weight, before and after
    card, front_matter    the model card. Parts of it: size_card, serving_card, and storage_card on
                          sparse storage; foreign_card; markdown keeps others' text in it text
    status, work, spans   how far a run is, who worked when, and what the rest will take
    watch, snapshot       the same again and again; the page of a run that goes on
    plan_table, ending    a plan before it is paid for; the last lines of a job that is done

To add a section: a template, a function that gives its values, a line in html.
"""
