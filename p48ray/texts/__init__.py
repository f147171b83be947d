"""Texts: where they lie, how they are read, and how they become sequences of token ids.

Belongs here: all that happens to calibration and held-out texts before the model sees them.

Read in this order:
    documents   which files are read, on a disk, in a bucket or in a data set of the Hub
    rows        records of a file, one after the other, by its form:
                json_rows (.jsonl, .json, packed as .gz), parquet_rows; text_file is what they share
    chat        from a row to its document: plain text, or a chat through the tokenizer's template;
                messages reads the spellings that chats, tool calls and reasoning have,
                reasoning puts back what a template takes from a chat's last answer
    tally       what was read, skipped and cut, and when that is too much
    tokenizing  from texts to token ids: transformers' own, faster
    packing     documents into sequences of one length, some tokenized ahead
    sequences   the source's tokenizer; a seeded sample of a mix, several sources read at once

To add a file format: a module as parquet_rows, its ending in rows, and in documents for folders.
"""
