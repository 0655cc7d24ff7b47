"""Alignment data: files and Hub datasets, read as TRL's dataset types and encoded with the model's chat template.

| file | what it does |
|---|---|
| dataset.py | the training and validation rows of a recipe, encoded |
| dataset_types.py | rows of any of the usual columns, as one of TRL's dataset types |
| messages.py | the messages in a column |
| read_rows.py | files, folders and Hub datasets, as rows |
| chat_template.py | prompts and conversations, as tokens |
| demo.py | the demonstration data, `--data bundled` |
"""
