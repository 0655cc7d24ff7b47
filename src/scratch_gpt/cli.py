"""The command ``scratch-gpt VERB``: finds the verb, reads its settings, runs it, and turns its end into an exit code.

0 done; 2 the user's mistake, one message; 75 stopped on request after saving; anything else is a bug and shows its
traceback. Each verb imports what it needs when it runs.
"""

import atexit
import errno
import importlib
import os
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from scratch_gpt import __version__, config
from scratch_gpt.errors import StoppedOnRequest, UserError

# verb: (its settings, the function that runs it as "module:function")
COMMANDS: dict[str, tuple[type, str]] = {
    "quickstart": (config.QuickstartSettings, "scratch_gpt.quickstart:quickstart_command"),
    "tokenizer train": (config.TokenizerTrainSettings, "scratch_gpt.data.tokenizer:train_command"),
    "tokenizer report": (config.TokenizerReportSettings, "scratch_gpt.data.tokenizer_report:report_command"),
    "data prepare": (config.DataPrepareSettings, "scratch_gpt.data.prepare:prepare_command"),
    "data inspect": (config.DataInspectSettings, "scratch_gpt.data.inspect:inspect_command"),
    "data import-datatrove": (config.DatatroveImportSettings, "scratch_gpt.data.datatrove:import_command"),
    "data export-datatrove": (config.DatatroveExportSettings, "scratch_gpt.data.datatrove:export_command"),
    "doctor": (config.DoctorSettings, "scratch_gpt.planning.doctor:doctor_command"),
    "plan": (config.PlanSettings, "scratch_gpt.planning.plan:plan_command"),
    "find-batch-size": (
        config.FindBatchSizeSettings,
        "scratch_gpt.planning.find_batch_size:find_batch_size_command",
    ),
    "pretrain": (config.PretrainSettings, "scratch_gpt.training.pretrain:pretrain_command"),
    "sft": (config.SFTSettings, "scratch_gpt.alignment.sft:sft_command"),
    "reward": (config.RewardSettings, "scratch_gpt.alignment.reward:reward_command"),
    "dpo": (config.DPOSettings, "scratch_gpt.alignment.dpo:dpo_command"),
    "kto": (config.KTOSettings, "scratch_gpt.alignment.kto:kto_command"),
    "grpo": (config.GRPOSettings, "scratch_gpt.alignment.grpo:grpo_command"),
    "rloo": (config.RLOOSettings, "scratch_gpt.alignment.grpo:rloo_command"),
    "ppo": (config.PPOSettings, "scratch_gpt.alignment.ppo.command:ppo_command"),
    "evaluate": (config.EvaluateSettings, "scratch_gpt.evaluation.evaluate:evaluate_command"),
    "generate": (config.GenerateSettings, "scratch_gpt.inference.generate:generate_command"),
    "export": (config.ExportSettings, "scratch_gpt.convert.export:export_command"),
    "import": (config.ImportSettings, "scratch_gpt.convert.export:import_command"),
}
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"scratch-gpt {__version__}")
        return 0
    try:
        verb = find_command(words)
        settings_class, target = COMMANDS[verb]
        settings: object = config.parse_settings(settings_class, words[len(verb.split()) :], f"scratch-gpt {verb}")
        # Nothing here calls home, and progress bars of libraries would tear our own apart.
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
        print("scratch-gpt: interrupted; the same command goes on from what is finished", file=sys.stderr)
        return EXIT_STOPPED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"scratch-gpt: {error.strerror}: {error.filename or 'while writing'}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def command() -> NoReturn:
    """:func:`main`, and the end of the process."""
    leave(main())


def leave(code: int) -> NoReturn:
    """End this process with exit code ``code``.

    One of several that a launcher started ends without taking the interpreter down: a thread of torch's that frees the
    tensors of the last collective needs the interpreter for it, and aborts the process if it is late.
    """
    if "RANK" in os.environ:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def find_command(words: Sequence[str]) -> str:
    """The one- or two-word verb at the head of ``words``; `scratch-gpt data` alone lists what follows it."""
    for length in (2, 1):
        verb = " ".join(words[:length])
        if verb in COMMANDS:
            return verb
    beginning = [verb for verb in COMMANDS if verb.split()[0] == words[0]]
    if beginning:
        raise UserError(f"'{words[0]}' needs a second word: " + ", ".join(f"scratch-gpt {verb}" for verb in beginning))
    return config.nearest_or_refuse(words[0], list(COMMANDS))


def overview() -> str:
    lines = ["usage: scratch-gpt VERB [--config FILE.yaml] [--setting value ...]", "", "verbs:"]
    lines += [f"  {verb:<22} {(settings.__doc__ or '').strip()}" for verb, (settings, _) in COMMANDS.items()]
    lines += ["", "scratch-gpt VERB --help lists the settings of a verb."]
    return "\n".join(lines)
