"""What is done to a finished checkpoint: verified by a stranger, converted, published.

Belongs here: work on a checkpoint folder. Only publishing asks the run root too, where there is
one, for verdicts and figures, and leaves records there.

Read in this order:
    survey                        what a checkpoint announces, before its shards are read
    verify_checkpoint, verifier   every byte against p48ray.json and, where given, the source
    config_update                 config.json of an older checkpoint, written anew
    forms, form_change            compressed linears in whatever form; from one form to another
    convert, converter            to sparse storage or ModelOpt's layout and back, without loss
    foreign, foreign_units        what others have made paired-4:8 sparse, with a p48ray.json
    foreign_verify                the same as it is, looked through
    release                       what is published: of a run root, or a folder by itself
    own_figures, requirements     what the run has measured of it, and what it has to be worth
    publish, publisher            what the Hub lacks of it, then one commit
    upload, branch                one shard on its way; what is asked of a repository's branch
    rehearsal                     what publishing would do

verifier, converter and publisher run what the module beside them says, in one process or in many.
To add a command: a pair here, a few lines in cli or in jobs/.
"""
