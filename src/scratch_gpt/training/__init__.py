"""The pretraining loop and its parts."""
