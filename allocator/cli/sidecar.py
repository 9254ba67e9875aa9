"""Serve the allocation API and its console over a store. No GPU, no torch in the service itself.

With --node it first prepares this pod's folder as `gamma prepare` does and is ready when that is done. Every option can
come from the environment (GAMMA_STORE, GAMMA_PORT, ...); an option on the command line wins. Token files hold lines
`read TOKEN` or `write TOKEN`; they are required to listen beyond this machine.
"""

import argparse
from pathlib import Path

from allocator.cli.deployment import add_deployment, add_store, from_environment, prepare_settings
from allocator.contract.errors import InputError
from allocator.contract.outputs import check_output_folder

EXAMPLES = """examples:
  gamma sidecar --store /store
  gamma sidecar --store s3://models/gamma --host 0.0.0.0 --token-file /run/secrets/tokens --read-only
  gamma sidecar --store /store --node Qwen3-8B --out /served --max-model-len 8192
  gamma sidecar --store /store --prepared /served --read-only"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument(
        "--token-file", type=Path, action="append", default=[], metavar="FILE", help="bearer tokens; may be repeated"
    )
    parser.add_argument("--read-only", action="store_true", help="write nothing: no checkpoints, nothing to the store")
    parser.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="folder for checkpoints (default: in a store that is a folder)"
    )
    parser.add_argument("--allowed-host", action="append", default=[], metavar="NAME", help="further name in URLs")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--solvers", type=int, default=2, help="processes that solve (default 2)")
    limits.add_argument("--solver-queue", type=int, default=32, help="requests that may wait for one (default 32)")
    limits.add_argument("--solver-seconds", type=float, default=20.0, help="limit on one solve (default 20)")
    limits.add_argument("--job-queue", type=int, default=8, help="checkpoints waiting or being made (default 8)")
    limits.add_argument("--body-bytes", type=int, default=1 << 20, help="largest request body (default 1048576)")
    limits.add_argument("--body-seconds", type=float, default=10.0, help="time for a request body (default 10)")
    limits.add_argument("--header-seconds", type=float, default=10.0, help="time for its headers (default 10)")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    parser.add_argument(
        "--node", nargs="?", const=True, metavar="MODEL", help="prepare this pod's folder (--out), then be ready"
    )
    parser.add_argument(
        "--prepared", type=Path, metavar="DIR", help="folder that `gamma prepare` filled: what is served beside this"
    )
    parser.add_argument("--model", metavar="MODEL", help="for --node: name or digest in the store, or a hub id")
    add_deployment(parser)
    from_environment(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.sidecar.server import serve
    from allocator.sidecar.settings import ServiceSettings

    if not args.store:
        raise InputError("--store is missing; give it, or set GAMMA_STORE")
    if args.checkpoints is not None and not args.read_only:
        check_output_folder(args.checkpoints, "--checkpoints")
    if isinstance(args.node, str) and args.node.lower() in ("", "0", "false", "no"):
        args.node = None  # from GAMMA_NODE
    if isinstance(args.node, str) and args.node.lower() not in ("1", "true", "yes"):
        args.model = args.node
    serve(
        ServiceSettings(
            store=args.store,
            host=args.host,
            port=args.port,
            token_files=tuple(args.token_file),
            read_only=args.read_only,
            checkpoints=args.checkpoints,
            solvers=args.solvers,
            solver_queue=args.solver_queue,
            solver_seconds=args.solver_seconds,
            job_queue=args.job_queue,
            body_bytes=args.body_bytes,
            body_seconds=args.body_seconds,
            header_seconds=args.header_seconds,
            log_level=args.log_level,
            allowed_hosts=("localhost", "127.0.0.1", "::1", *args.allowed_host),
            node=prepare_settings(args) if args.node else None,
            prepared=args.prepared.absolute() if args.prepared else None,
            node_out=args.out.absolute() if args.out else None,
        )
    )
