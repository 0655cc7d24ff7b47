"""``python -m scratch_gpt COMMAND`` and ``accelerate launch -m scratch_gpt COMMAND``: the same as the command scratch-gpt."""

from scratch_gpt.cli import command

if __name__ == "__main__":
    command()
