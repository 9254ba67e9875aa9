"""`gamma VERB ...`: finds the verb, turns errors into one line on stderr and an exit code."""

import argparse
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from allocator import __version__
from allocator.contract.errors import GammaError, InputError

__all__ = ["main"]

VERBS = {
    "inspect": "what is in a model: modules, shapes, bytes at every width, feasible budgets",
    "learn": "build the candidates of a model and learn what each width of each module costs",
    "plan": "what a GPU's memory leaves for the weights, for your traffic",
    "solve": "find the best assignment for a budget",
    "refine": "improve an assignment for its budget by changes that are measured",
    "tune": "learn the codes and scales of an assignment anew, its bytes unchanged",
    "export": "write the checkpoint of an assignment",
    "fit": "learn, solve and export in one step",
    "show": "show an assignment: width of every module, bytes, a heat map",
    "diff": "show what changed between two assignments of one model",
    "sweep": "solve for many budgets: what each buys, as a table and a figure",
    "probe": "start vLLM once on this device and keep what it really used",
    "kv": "measure what an fp8 KV cache costs",
    "verify": "check that a checkpoint is what it declares",
    "store": "fill and list a store that the sidecar and prepare read",
    "prepare": "from a store and a GPU to a checkpoint and the arguments of vllm, for init containers",
    "cache": "a folder of a node in which checkpoints and compiled graphs outlive their pods",
    "sidecar": "serve the allocation API and its console",
    "remote": "ask a running sidecar: models, plans, allocations, checkpoints",
    "warmup": "compile ahead what the kernels of a checkpoint need",
    "schema": "print the JSON Schema of a file format",
}
_EXTRAS = {"sidecar": "sidecar", "remote": "sidecar"}
"""What brings the packages of a verb, if not the extra `learn`."""
_REASON_CHARACTERS = 300
_EPILOG = """exit codes: 0 done, 1 unexpected error (its traceback is kept in a file), 2 bad argument or input,
3 a file was refused, 4 the budget cannot be met or a plan's answer is no, 75 stopped by SIGTERM after a finished step
(run it again), 130 interrupted"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and takes `-3GiB` for a value, so that it is refused as one."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"^-\.?\d")

    def error(self, message: str) -> NoReturn:
        self.exit(InputError.exit_code, f"{self.prog}: {message}; `{self.prog} --help` shows what is allowed\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code."""
    # Read when torch loads. Threads that spin while they wait slow a busy machine down several times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = _Parser(
        prog="gamma",
        description="Give every module of a language model the bits it deserves, to the byte.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gamma {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        module = import_module(f"allocator.cli.{name}")
        verb = verbs.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    try:
        code: int | None = parsed.run(parsed)
    except GammaError as error:
        print(f"gamma {parsed.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "allocator"):
            print(f"gamma {parsed.verb}: {_unexpected(error)}", file=sys.stderr)
            return GammaError.exit_code
        print(
            f"gamma {parsed.verb}: needs the package {package}, which is not installed; "
            f"pip install 'gamma-vllm[{_EXTRAS.get(parsed.verb, 'learn')}]' brings what this verb needs",
            file=sys.stderr,
        )
        return InputError.exit_code
    except KeyboardInterrupt:
        print(f"gamma {parsed.verb}: interrupted; the same command goes on from what is done", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        print(f"gamma {parsed.verb}: {place}{error.strerror or error}", file=sys.stderr)
        return InputError.exit_code
    except Exception as error:
        print(f"gamma {parsed.verb}: {_unexpected(error)}", file=sys.stderr)
        return GammaError.exit_code
    return code or 0


def _unexpected(error: Exception) -> str:
    """One line for a fault of ours; the traceback goes into a file, for the report of it."""
    trace = "".join(traceback.format_exception(error))
    text = " ".join(str(error).split())[:_REASON_CHARACTERS]
    try:
        with tempfile.NamedTemporaryFile("w", prefix="gamma-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(f"gamma {__version__}, {shlex.join(sys.argv)}\n{trace}")
    except OSError:
        return f"unexpected {type(error).__name__}: {text}\n{trace}"
    return f"unexpected {type(error).__name__}: {text} (a fault of gamma: please report it with {file.name})"


if __name__ == "__main__":
    sys.exit(main())
