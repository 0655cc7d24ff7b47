"""The command ``scratch-gpt COMMAND``: find the command, read its settings, run it, and return an exit code.

0 done; 2 the user's mistake, one message; 75 stopped on request after saving; anything else is a bug and shows its
traceback. Each command imports what it needs when it runs.
"""

import atexit
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from scratch_gpt import __version__, config
from scratch_gpt.errors import StoppedOnRequest, UserError

# Stage of the path: {command: (its settings, the function that runs it, as module:function)}
STAGES: dict[str, dict[str, tuple[type, str]]] = {
    "Start here": {
        "quickstart": (config.QuickstartSettings, "scratch_gpt.quickstart:quickstart_command"),
    },
    "Prepare text": {
        "tokenizer train": (config.TokenizerTrainSettings, "scratch_gpt.data.tokenizer:train_command"),
        "tokenizer report": (config.TokenizerReportSettings, "scratch_gpt.data.tokenizer_report:report_command"),
        "data prepare": (config.DataPrepareSettings, "scratch_gpt.data.prepare:prepare_command"),
        "data inspect": (config.DataInspectSettings, "scratch_gpt.data.inspect:inspect_command"),
        "data import-datatrove": (config.DatatroveImportSettings, "scratch_gpt.data.datatrove:import_command"),
        "data export-datatrove": (config.DatatroveExportSettings, "scratch_gpt.data.datatrove:export_command"),
    },
    "Plan a run": {
        "plan": (config.PlanSettings, "scratch_gpt.planning.plan:plan_command"),
        "find-batch-size": (
            config.FindBatchSizeSettings,
            "scratch_gpt.planning.find_batch_size:find_batch_size_command",
        ),
        "doctor": (config.DoctorSettings, "scratch_gpt.planning.doctor:doctor_command"),
    },
    "Train": {
        "pretrain": (config.PretrainSettings, "scratch_gpt.training.pretrain:pretrain_command"),
    },
    "Align": {
        "sft": (config.SFTSettings, "scratch_gpt.alignment.sft:sft_command"),
        "reward": (config.RewardSettings, "scratch_gpt.alignment.reward:reward_command"),
        "dpo": (config.DPOSettings, "scratch_gpt.alignment.dpo:dpo_command"),
        "kto": (config.KTOSettings, "scratch_gpt.alignment.kto:kto_command"),
        "ppo": (config.PPOSettings, "scratch_gpt.alignment.ppo.command:ppo_command"),
        "grpo": (config.GRPOSettings, "scratch_gpt.alignment.grpo:grpo_command"),
        "rloo": (config.RLOOSettings, "scratch_gpt.alignment.grpo:rloo_command"),
    },
    "Evaluate and use": {
        "evaluate": (config.EvaluateSettings, "scratch_gpt.evaluation.evaluate:evaluate_command"),
        "generate": (config.GenerateSettings, "scratch_gpt.inference.generate:generate_command"),
    },
    "Convert": {
        "export": (config.ExportSettings, "scratch_gpt.convert.export:export_command"),
        "import": (config.ImportSettings, "scratch_gpt.convert.export:import_command"),
    },
}
COMMANDS = {name: entry for stage in STAGES.values() for name, entry in stage.items()}
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Default: the words of this process's command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"scratch-gpt {__version__}")
        return 0
    try:
        name = find_command(words)
        settings_class, target = COMMANDS[name]
        settings: object = config.parse_settings(settings_class, words[len(name.split()) :], f"scratch-gpt {name}")
        # No telemetry, and no progress bars of libraries that would interrupt ours.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        module, function = target.split(":")
        getattr(importlib.import_module(module), function)(settings)
    except UserError as error:
        print(f"scratch-gpt: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except StoppedOnRequest as stop:
        print(f"scratch-gpt: {stop}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("scratch-gpt: interrupted; run the same command again to resume", file=sys.stderr)
        return EXIT_STOPPED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"scratch-gpt: {error.strerror}: {error.filename or 'while writing'}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def command() -> NoReturn:
    """Run :func:`main` and end the process with its exit code."""
    leave(main())


_launched_exit_code: int | None = None


@atexit.register
def _skip_teardown() -> None:
    """End a launched process before the interpreter is torn down.

    A torch thread that frees the tensors of the last collective needs the interpreter, and aborts the process if that is
    already gone. Exit functions run in reverse order, so those of everything imported after this module (trackers,
    accelerate) run first.
    """
    if _launched_exit_code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_launched_exit_code)


def leave(code: int) -> NoReturn:
    """End this process with exit code ``code``; one that a launcher started, without tearing the interpreter down."""
    global _launched_exit_code
    if "RANK" in os.environ:
        _launched_exit_code = code
    sys.exit(code)


def find_command(words: Sequence[str]) -> str:
    """The command of one or two words at the head of ``words``.

    Raises:
        UserError: there is none; for `scratch-gpt data` alone it lists the commands that begin so.
    """
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name
    beginning = [name for name in COMMANDS if name.split()[0] == words[0]]
    if beginning:
        raise UserError(f"'{words[0]}' needs a second word: " + ", ".join(f"scratch-gpt {name}" for name in beginning))
    config.refuse_unknown_command(words[0], list(COMMANDS))


def overview() -> str:
    """The commands by stage, one line each."""
    lines = ["usage: scratch-gpt COMMAND [--config FILE.yaml] [--SETTING VALUE ...]"]
    for stage, commands in STAGES.items():
        lines += ["", f"{stage}:"]
        lines += [f"  {name:<22} {(settings.__doc__ or '').strip()}" for name, (settings, _) in commands.items()]
    lines += ["", "scratch-gpt COMMAND --help lists the settings of a command."]
    return "\n".join(lines)
