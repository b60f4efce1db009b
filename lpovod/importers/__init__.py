"""Files of other projects, read into the artefacts of this one.

No code that a file could bring is ever run: pickles pass a list of what they may name, checkpoints
are read with ``weights_only=True``. Every key of a file is used, or named.
"""
