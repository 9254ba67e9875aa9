"""A folder of a node in which checkpoints and compiled graphs outlive their pods.

`gamma prepare --cache-limit` fills it. What is in use has a lock, and is never removed; of the rest the
longest unused goes first.
"""

import argparse
import os
import time
from pathlib import Path

from allocator.cli.options import add_json
from allocator.cli.output import print_json, print_tables
from allocator.contract.errors import InputError

EXAMPLES = """examples:
  gamma prepare Qwen3-8B --store /store --out /node/qwen --gpu l4 --cache-limit 200GiB
  gamma cache run --entry /node/qwen --compiled qwen-v1 -- vllm serve --config /node/qwen/vllm.yaml
  gamma cache list /node
  gamma cache clean /node --limit 100GiB"""

# Where programs below vLLM keep what they compile.
_FOLDERS = {
    "HUMMING_CACHE_DIR": "humming",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "VLLM_CACHE_ROOT": "vllm",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="run|list|clean", required=True)
    run = actions.add_parser("run", help="run a program that uses an entry, until it ends")
    run.add_argument("--entry", type=Path, required=True, metavar="DIR", help="folder that `gamma prepare` filled")
    run.add_argument(
        "--compiled",
        metavar="NAME",
        help="keep what is compiled beside the entry, in NAME.0, or NAME.1 while another process has that, and so on",
    )
    run.add_argument("command", nargs="+", metavar="-- COMMAND", help="program and its arguments")
    listing = actions.add_parser("list", help="what is in the cache, the longest unused first")
    clean = actions.add_parser("clean", help="remove what is not in use until the rest is within the limit")
    clean.add_argument("--limit", required=True, metavar="BYTES", help="e.g. 200GiB")
    for action in (listing, clean):
        action.add_argument("folder", type=Path, metavar="DIR")
        add_json(action)


def run(args: argparse.Namespace) -> None:
    {"run": _run, "list": _list, "clean": _clean}[args.action](args)


def _run(args: argparse.Namespace) -> None:
    """Becomes the command, with the locks still held: the kernel gives them back when it ends."""
    from allocator.sidecar.node_cache import hold, take_slot

    entry = args.entry.absolute()
    if not entry.is_dir():
        raise InputError(f"{entry}: there is no such folder; `gamma prepare --out {entry}` makes it")
    os.set_inheritable(hold(entry), True)
    if args.compiled is not None:
        slot, lock = take_slot(entry.parent, args.compiled)
        os.set_inheritable(lock, True)
        for variable, folder in _FOLDERS.items():
            os.environ[variable] = str(slot / folder)
    try:
        os.execvp(args.command[0], args.command)
    except OSError as error:
        raise InputError(f"{args.command[0]}: cannot be run ({error.strerror})") from None


def _list(args: argparse.Namespace) -> None:
    from allocator.contract.amounts import format_bytes
    from allocator.report.tables import new_table
    from allocator.sidecar.node_cache import cache_entries

    entries = cache_entries(args.folder)
    if args.json:
        print_json([
            {"name": e.path.name, "bytes": e.nbytes, "used_at": e.used_at, "in_use": e.in_use} for e in entries
        ])  # fmt: skip
        return
    table = new_table(str(args.folder))
    for column in ("entry", "size", "last used", ""):
        table.add_column(column, no_wrap=True)
    for e in entries:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(e.used_at))
        table.add_row(e.path.name, format_bytes(e.nbytes), when, "in use" if e.in_use else "")
    print_tables(table)


def _clean(args: argparse.Namespace) -> None:
    from allocator.contract.amounts import format_bytes, parse_budget
    from allocator.sidecar.node_cache import make_room

    removed = make_room(args.folder, parse_budget(args.limit, "limit"))
    if args.json:
        print_json([{"name": e.path.name, "bytes": e.nbytes} for e in removed])
    else:
        freed = format_bytes(sum(e.nbytes for e in removed))
        print_tables(*(f"removed {e.path.name}" for e in removed), f"{len(removed)} entries, {freed}")
