"""Converts files of other projects into artifacts of this one.

No code in a file is ever run: pickles may name only listed functions, and checkpoints are read with
``weights_only=True``. Every key of a file is either used or named in an error.
"""
