"""The documentation: every command that it shows parses, and every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from scratch_gpt import config
from scratch_gpt.cli import COMMANDS, find_command

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]


def shown_commands(text: str) -> list[list[str]]:
    """The arguments of every `scratch-gpt ...` in indented lines, fenced blocks and code spans of a page."""
    joined = re.sub(r"\\\n\s*", " ", text)
    blocks = re.findall(r"^(?: {4}|\$ )(.*)$", joined, flags=re.MULTILINE)
    blocks += [
        line for fence in re.findall(r"```\w*\n(.*?)```", joined, flags=re.DOTALL) for line in fence.splitlines()
    ]
    blocks += re.findall(r"`([^`\n]+)`", joined)
    found = []
    for line in blocks:
        match = re.search(r"(?:^|[ /])(?:scratch-gpt|python -m scratch_gpt|-m scratch_gpt) (?=[a-z])(.*)", line)
        if match is None:
            continue
        words = shlex.split(re.split(r"\s#|\s{2,}#|;|&&", match.group(1))[0])
        if "..." not in words and not any(word.isupper() for word in words[:1]):
            found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_shown_is_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in shown_commands(page.read_text(encoding="utf-8")):
        command = find_command(words)
        arguments = [word for word in words[len(command.split()) :] if word not in ("--help",)]
        config.parse_settings(COMMANDS[command][0], arguments, f"scratch-gpt {command}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"


def test_the_readme_names_every_command():
    prose = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    named = re.findall(r"`([^`]+)`", prose)
    assert [command for command in COMMANDS if command not in named] == []


def test_commands_are_found_in_a_page():
    page = (
        "text `scratch-gpt plan --devices 8`\n\n    accelerate launch -m scratch_gpt sft \\\n        --seed 3   # why\n"
    )
    assert shown_commands(page) == [["sft", "--seed", "3"], ["plan", "--devices", "8"]]
