"""Raw text to tokenizer to token shards to batches.

In reading order; a file imports only files further down this list:

    prepare.py  workers.py  work_units.py  dedup.py  tokenizer_report.py  datatrove.py  inspect.py      making shards
    tokenizer.py  sources.py  records.py  inputs.py  encoding.py                                         reading text
    loader.py  mixture.py  batches.py  packing.py  shards.py  permutation.py                          reading shards
"""
